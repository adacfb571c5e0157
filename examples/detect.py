"""Blood cells in a photo, found by the 2:4 network of models/detection-2of4: boxes are drawn into a copy of it.

pip install 'openwork[train]'
python detect.py PHOTO --out boxes.png
"""

import argparse
from pathlib import Path

import torch

from openwork.recipes.trained import load_run  # before torchvision

from PIL import Image, ImageDraw  # isort: skip
from torchvision.transforms.v2.functional import pil_to_tensor, resize  # isort: skip

MODEL = Path(__file__).parents[1] / "models" / "detection-2of4"
COLOURS = ["red", "blue", "green"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("boxes.png"))
    parser.add_argument("--least", type=float, default=0.5, help="score that a box needs")
    asked = parser.parse_args()

    net, _, config, info = load_run(asked.model)
    photo = Image.open(asked.photo).convert("RGB")
    small = resize(pil_to_tensor(photo), [config.image_size], max_size=config.max_size)
    with torch.no_grad():
        (found,) = net([small / 255])
    draw, names = ImageDraw.Draw(photo), []
    for box, label, score in zip(found["boxes"], found["labels"].tolist(), found["scores"].tolist(), strict=True):
        if score >= asked.least:
            place = (box * photo.width / small.shape[-1]).tolist()
            colour = COLOURS[label % len(COLOURS)]
            draw.rectangle(place, outline=colour, width=3)
            names.append(info.classes[label - 1])
            draw.text((place[0] + 5, place[1] + 4), f"{names[-1]} {score:.0%}", fill=colour)
    photo.save(asked.out)
    print(f"{asked.out}: {', '.join(f'{names.count(name)} {name}' for name in sorted(set(names))) or 'nothing'}")


if __name__ == "__main__":
    main()
