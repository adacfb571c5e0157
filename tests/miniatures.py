"""The published data sets in small: their folders and files, with a handful of samples that are made here."""

import json

import numpy as np
from flowbytes import flo
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n01484850")
ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
EINS = ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf")


def picture(path, width, height, seed):
    """Noise of a few pixels' size, so that neither a crop nor a JPEG is of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)


def imagenet(folder, train=8, val=2):
    """train/SYNSET/SYNSET_NUMBER.JPEG and val/SYNSET/ILSVRC2012_val_NUMBER.JPEG; so many of each of three classes."""
    for label, synset in enumerate(SYNSETS):
        for number in range(train):
            picture(folder / "train" / synset / f"{synset}_{number}.JPEG", 48, 40, 100 * label + number)
        for number in range(val):
            picture(
                folder / "val" / synset / f"ILSVRC2012_val_{3 * number + label:08d}.JPEG", 40, 48, 100 * label + number
            )
    return folder


def coco(folder, train=8, val=2):
    """annotations/instances_*2017.json with ids that leave gaps, polygons and a crowd, an image without objects, and in
    train a box without height, as train2017 has one."""
    for part, count in (("train", train), ("val", val)):
        images = [
            {"id": 139 + 7 * i, "file_name": f"{139 + 7 * i:012d}.jpg", "width": 80, "height": 64, "license": 1}
            for i in range(count)
        ]
        for image in images:
            picture(folder / f"{part}2017" / image["file_name"], 80, 64, image["id"])
        objects = [
            _object(2 * i + side, image["id"], (1, 18, 44)[(i + side) % 3], 8 + 36 * side, 8 + i)
            for i, image in enumerate(images[: count - (part == "train")])
            for side in (0, 1)
        ]
        objects[0] |= {"iscrowd": 1, "segmentation": {"size": [64, 80], "counts": [512, 640, 64 * 80 - 1152]}}
        if part == "train":
            objects[2] |= {"bbox": [8, 8, 20, 0]}
        names = {1: "person", 18: "dog", 44: "bottle"}
        content = {
            "info": {"year": 2017},
            "licenses": [{"id": 1}],
            "images": images,
            "annotations": objects,
            "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in names.items()],
        }
        file = folder / "annotations" / f"instances_{part}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def _object(number, image, category, x, y):
    return {
        "id": number + 1,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, 28, 40],
        "area": 28 * 40,
        "iscrowd": 0,
        "segmentation": [[x, y, x + 28, y, x + 28, y + 40, x, y + 40]],
    }


def wmt14(folder, train=60, val=6):
    """train.en, train.de, and newstest2014 of both."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, start in (("train", train, 0), ("newstest2014", val, 1000)):
        numbers = [[(start + 7 * i + j * j) % 12 for j in range(1 + i % 5)] for i in range(count)]
        for language, words in (("en", ONES), ("de", EINS)):
            lines = [" ".join(words[number] for number in line) for line in numbers]
            (folder / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# The flow of a pair is its number everywhere.


def frame(path, height=130, width=136):
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x, y, x + y], axis=-1).astype(np.uint8)).save(path)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def flying_chairs(folder, pairs=3):
    """FlyingChairs/data/NUMBER_img1.ppm, ..., of which the second pair is for validation."""
    folder = folder / "FlyingChairs"
    for i in range(1, pairs + 1):
        frame(folder / f"data/{i:05d}_img1.ppm")
        frame(folder / f"data/{i:05d}_img2.ppm")
        put(folder / f"data/{i:05d}_flow.flo", flo(np.full((2, 130, 136), i, np.float32)))
    put(folder / "FlyingChairs_train_val.txt", b"1\n2\n" + b"1\n" * (pairs - 2))
    return folder.parent
