"""Blood cells in a photo, found by the 2:4 network of models/detection-2of4: boxes are drawn into a copy of it.

pip install 'openwork[train]'
python detect.py PHOTO --out boxes.png
"""

import argparse
from pathlib import Path

import torch

from openwork.recipes.trained import load_run  # before torchvision

from torchvision.transforms.v2.functional import resize  # isort: skip
from torchvision.io import ImageReadMode, decode_image, write_png  # isort: skip
from torchvision.utils import draw_bounding_boxes  # isort: skip

MODEL = Path(__file__).parents[1] / "models" / "detection-2of4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("boxes.png"))
    parser.add_argument("--least", type=float, default=0.5, help="score that a box needs")
    asked = parser.parse_args()

    net, _, config, info = load_run(asked.model)
    photo = decode_image(str(asked.photo), ImageReadMode.RGB)
    small = resize(photo, [config.image_size], max_size=config.max_size)
    with torch.no_grad():
        (found,) = net([small / 255])
    sure = found["scores"] >= asked.least
    boxes = found["boxes"][sure] * (photo.shape[-1] / small.shape[-1])
    names = [info.classes[number - 1] for number in found["labels"][sure]]
    labels = [f"{name} {score:.0%}" for name, score in zip(names, found["scores"][sure], strict=True)]
    write_png(draw_bounding_boxes(photo, boxes, labels, colors="red", width=2), str(asked.out))
    print(f"{asked.out}: {', '.join(f'{names.count(name)} {name}' for name in sorted(set(names))) or 'nothing'}")


if __name__ == "__main__":
    main()
