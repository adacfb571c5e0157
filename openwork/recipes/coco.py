"""Images with objects as COCO describes them: a json file of images, boxes, masks and classes for each part.

    DIR/annotations/instances_train2017.json, instances_val2017.json, images in DIR/train2017 and DIR/val2017, or
    DIR/instances_train.json, instances_val.json, images in DIR/images

Masks are polygons or run lengths, compressed or not. Classes are numbered from 1 in the order of their ids. The files
are read here and not by torchvision's CocoDetection, which reports none of their faults.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openwork.recipes.data_files import DataFolder, check_image_size
from openwork.recipes.images import open_image

LAYOUT = (
    "annotations/instances_train2017.json and instances_val2017.json with train2017/ and val2017/, "
    "or instances_train.json and instances_val.json with images/"
)
_FAR = 1e9  # pixels: no coordinate and no area is larger
_SLACK = 1.0  # pixels by which a box may stick out: some tools count pixels, others their edges
_SECTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "width": (object,), "height": (object,)},
    "annotations": {"id": (int, str), "image_id": (int, str)},
    "categories": {"id": (int,), "name": (str,)},
}


@dataclass(frozen=True)
class CocoImage:
    """One image of a json file with its annotations, whose `category_id` is the class from 1."""

    path: Path
    id: int
    width: int
    height: int
    annotations: Sequence[dict[str, Any]]


def coco_parts(folder: Path) -> list[tuple[Path, Path]]:
    """The json file and the folder of images for training and for validation."""
    for pattern, images in (("annotations/instances_{}2017.json", "{}2017"), ("instances_{}.json", "images")):
        if (folder / pattern.format("train")).exists():
            return [(folder / pattern.format(part), folder / images.format(part)) for part in ("train", "val")]
    raise FileNotFoundError(f"{folder} has no instances_train.json; it must hold {LAYOUT}")


def read_part(
    file: Path, images: Path, *, masks: bool, skip_bad: bool, follow_links: bool = False
) -> tuple[list[CocoImage], list[str], int]:
    """The usable images of a json file, the names of its classes, and how many images were left out.

    ValueError says which annotation of which image is wrong and how. `masks` demands one for every object. `skip_bad`
    leaves out every image that has a fault or cannot be decoded; without it that is an error when it is used.
    """
    root = DataFolder(images.parent, follow_links)
    root.check(file)
    content = _sections(file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: i for i, category in enumerate(categories, start=1)}
    entries, skipped = [], 0
    for entry in _entries(file, images, content):
        try:
            root.check(entry.path, images)
            _check(entry, numbers, masks)
            if skip_bad:
                load_image(entry)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{file}: {error}; correct it, or add --skip_bad to leave such images out") from None
            skipped += 1
            continue
        kept = [{k: v for k, v in known.items() if masks or k != "segmentation"} for known in entry.annotations]
        listed = [{**known, "category_id": numbers[known["category_id"]]} for known in kept]
        entries.append(replace(entry, annotations=listed))
    if not any(entry.annotations for entry in entries):
        raise ValueError(f"{file}: not one image with an object is left ({skipped} of them were left out as bad)")
    return entries, [str(category["name"]) for category in categories], skipped


def _sections(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; the folder must hold {LAYOUT}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # json's own says the line and column
        raise ValueError(f"{file} is not JSON: {error}") from error
    for section, keys in _SECTIONS.items():
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"{file} has no list {section!r}; a COCO file holds {', '.join(_SECTIONS)}")
        for place, item in enumerate(content[section]):
            if lacks := [key for key in keys if not isinstance(item, dict) or key not in item]:
                raise ValueError(f"{file}: {section}[{place}] has no {', '.join(lacks)}")
            if wrong := [key for key, kinds in keys.items() if not isinstance(item[key], kinds)]:
                raise ValueError(
                    f"{file}: {section}[{place}] has {str(item[wrong[0]])[:40]!r} as its {wrong[0]}; needed is "
                    f"{' or '.join(kind.__name__ for kind in keys[wrong[0]])}"
                )
    return content


def _entries(file: Path, images: Path, content: Mapping[str, Any]) -> Iterator[CocoImage]:
    by_image = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    ids = {image["id"] for image in content["images"]}
    if len(ids) != len(content["images"]):
        raise ValueError(f"{file}: two images have the same id")
    if strange := sorted(set(by_image) - ids, key=str):
        lost = by_image[strange[0]][0]["id"]
        raise ValueError(f"{file}: annotation {lost} belongs to image {strange[0]!r}, which the file does not list")
    for image in content["images"]:
        path = images / image["file_name"]
        yield CocoImage(path, image["id"], image["width"], image["height"], by_image[image["id"]])


def _check(entry: CocoImage, numbers: Mapping[int, int], masks: bool) -> None:
    """ValueError with what is wrong with an image."""
    size = entry.width, entry.height
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image {entry.id}: width and height are {size[0]!r} and {size[1]!r}; needed are pixels")
    check_image_size(*size)
    if not entry.path.is_file():
        raise ValueError(f"image {entry.id}: {entry.path} is missing")
    for annotation in entry.annotations:
        number = annotation.get("category_id")
        known = isinstance(number, int) and number in numbers
        fault = "" if known else f"its category_id {number!r} is not in the list of categories"
        fault = fault or box_fault(annotation.get("bbox"), *size) or _extras_fault(annotation)
        fault = fault or (mask_fault(annotation.get("segmentation"), *size) if masks else "")
        if fault:
            raise ValueError(f"annotation {annotation['id']} of {entry.path.name}: {fault}")


def box_fault(box: Any, width: int, height: int) -> str:
    """Why x, y, width, height is no box of an image of that size; "" where it is one.

    >>> box_fault([0, 0, 10, 20], 30, 20), box_fault([0, 0, 10, 24], 30, 20)
    ('', 'the box [0, 0, 10, 24] reaches outside the image of 30 x 20 pixels')
    """
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox is {box!r}; needed are four numbers x, y, width, height"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"the box {box} is empty"
    if min(x, y) < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
        return f"the box {box} reaches outside the image of {width} x {height} pixels"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -_FAR < value < _FAR  # NaN is not


def _extras_fault(annotation: Mapping[str, Any]) -> str:
    if not _is_number(annotation.get("area", 0)):
        return f"its area is {str(annotation['area'])[:40]!r}, not a number"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"its iscrowd is {str(annotation['iscrowd'])[:40]!r}, not 0 or 1"
    return ""


def mask_fault(mask: Any, width: int, height: int) -> str:
    """Why a segmentation is no mask of an image of that size; "" where it is one. Polygons are not rasterized here."""
    if isinstance(mask, list):
        if not mask:
            return "its segmentation is empty"
        short = [p for p in mask if not isinstance(p, list) or len(p) < 6 or len(p) % 2 or not all(map(_is_number, p))]
        if short:
            return f"polygon {str(short[0])[:60]} needs three or more points x, y"
        most = max(width, height)  # pycocotools walks along every edge, however long
        far = [value for polygon in mask for value in polygon if not -most <= value <= 2 * most]
        return f"a point of its polygon is at {far[0]}, far outside the image" if far else ""
    if not isinstance(mask, dict) or not {"size", "counts"} <= set(mask):
        return "it has no segmentation: a list of polygons, or size and counts of run lengths"
    if not isinstance(mask["counts"], str | bytes | list):
        return f"its counts are {str(mask['counts'])[:40]!r}; needed are run lengths, as a list or packed as text"
    if mask["size"] != [height, width]:
        return f"its run lengths are of a mask of {mask['size']} pixels, those of the image are {[height, width]}"
    runs = mask["counts"] if isinstance(mask["counts"], list) else run_lengths(mask["counts"])
    if any(not isinstance(run, int) or run < 0 for run in runs) or sum(runs) != width * height:
        return f"its run lengths do not add up to the {width} x {height} pixels of the image"
    return "" if sum(runs[1::2]) else "its mask is empty"


def run_lengths(text: str | bytes) -> list[int]:
    """The run lengths in COCO's packed form: five bits a character, lowest first, and from the fourth run on as the
    difference to the run before the last. pycocotools writes beyond its memory where they do not fit, so we look.

    >>> run_lengths("916")
    [9, 1, 6]
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text.encode() if isinstance(text, str) else text:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number
            value -= (bits & 16) << (shift - 4)  # its sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def decode_mask(mask: Any, width: int, height: int) -> np.ndarray:
    """A segmentation of any form as uint8 (height, width)."""
    from pycocotools import mask as rle

    if isinstance(mask, list):
        mask = rle.merge(rle.frPyObjects(mask, height, width))
    elif isinstance(mask["counts"], list):
        mask = rle.frPyObjects(mask, height, width)
    return rle.decode(mask)


def load_image(entry: CocoImage) -> Any:
    """The decoded image, RGB; ValueError names the file where it cannot be decoded or has another size."""
    image = open_image(entry.path)
    if image.size != (entry.width, entry.height):
        raise ValueError(
            f"{entry.path} has {image.width} x {image.height} pixels and its json file says {entry.width} x "
            f"{entry.height}; correct the file, or add --skip_bad to leave such images out"
        )
    return image


def truth_of(classes: Sequence[str], entries: Sequence[CocoImage]) -> dict[str, Any]:
    """What metrics are computed against, as pycocotools takes it."""
    listed = [{**known, "image_id": entry.id} for entry in entries for known in entry.annotations]
    defaults = [{"area": known["bbox"][2] * known["bbox"][3], "iscrowd": 0} for known in listed]
    numbered = enumerate(zip(defaults, listed, strict=True), start=1)
    return {
        "images": [{"id": entry.id, "width": entry.width, "height": entry.height} for entry in entries],
        "annotations": [{**default, **known, "id": number} for number, (default, known) in numbered],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
    }
