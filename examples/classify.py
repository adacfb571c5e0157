"""What is on pictures of clothes, by the 2:4 network of models/classification-2of4: a sheet of them with its answers.

pip install 'openwork[train]'
python classify.py fashion-mnist=DIR --out clothes.png      # DIR: the four idx files of Fashion-MNIST
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from openwork.recipes import find
from openwork.recipes.trained import load_run

from PIL import Image, ImageDraw  # isort: skip

MODEL = Path(__file__).parents[1] / "models" / "classification-2of4"
NAMES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
ACROSS, SIDE = 8, 84


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("clothes.png"))
    asked = parser.parse_args()

    net, _, config, _ = load_run(asked.model)
    data = find("classification").load_data(replace(config, data=asked.data, limit_val=4 * ACROSS))
    ((pixels, labels),) = data.val_batches([np.arange(data.val_count)])
    with torch.no_grad():
        answers = net(pixels).argmax(1).tolist()
    sheet = Image.new("RGB", (ACROSS * SIDE, -(-len(answers) // ACROSS) * (SIDE + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, answer, label) in enumerate(zip(data.val.images, answers, labels.tolist(), strict=True)):
        x, y = place % ACROSS * SIDE, place // ACROSS * (SIDE + 14)
        sheet.paste(Image.fromarray(255 - picture[0].numpy()).resize((SIDE, SIDE)), (x, y))
        draw.text((x + 2, y + SIDE), NAMES[answer], fill="black" if answer == label else "red")
    sheet.save(asked.out)
    right = sum(a == b for a, b in zip(answers, labels.tolist(), strict=True))
    print(f"{asked.out}: {right} of {len(answers)} answers are right, the others are red")


if __name__ == "__main__":
    main()
