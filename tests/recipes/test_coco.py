"""The reader of COCO files, against files made here, good and bad."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from openwork.recipes import coco
from openwork.recipes.detection import TASK, DetectionConfig
from openwork.recipes.objects import CocoImages, boxes_around
from openwork.recipes.segmentation import TASK as SEGMENTATION
from openwork.recipes.segmentation import SegmentationConfig

SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


def annotation(number, image, **changed):
    fields = {"id": number, "image_id": image, "category_id": 7, "bbox": [10, 5, 20, 20], "segmentation": SQUARE}
    return {**fields, **changed}


def write(folder, annotations, part="train", count=3, size=(40, 30)):
    """A json file of `count` images, numbered from 1, and the images themselves."""
    (folder / "images").mkdir(exist_ok=True)
    images = [{"id": i + 1, "file_name": f"{i + 1}.png", "width": size[0], "height": size[1]} for i in range(count)]
    for each in images:
        Image.new("RGB", size, (10 * each["id"], 0, 0)).save(folder / "images" / each["file_name"])
    categories = [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"instances_{part}.json").write_text(json.dumps(content))


GOOD = [annotation(1, 1), annotation(2, 3, category_id=3), annotation(3, 3, iscrowd=1)]


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        write(tmp_path, GOOD, part)
    return tmp_path


def read(folder, **flags):
    file, images = coco.coco_parts(folder)[0]
    entries, classes, skipped = coco.read_part(file, images, **{"masks": True, "skip_bad": False, **flags})
    return SimpleNamespace(entries=entries, classes=classes, skipped=skipped)


def test_classes_are_numbered_in_the_order_of_their_ids(folder):
    part = read(folder)
    assert list(part.classes) == ["cat", "cup"]
    assert [[each["category_id"] for each in entry.annotations] for entry in part.entries] == [[2], [], [1, 2]]


def test_the_layout_of_the_published_data_set(tmp_path, folder):
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        os.rename(folder / f"instances_{part}.json", tmp_path / "annotations" / f"instances_{part}2017.json")
    (folder / "images").rename(tmp_path / "train2017")
    assert len(read(tmp_path).entries) == 3
    with pytest.raises(FileNotFoundError, match=r"has no instances_train.json; it must hold annotations/"):
        coco.coco_parts(tmp_path / "train2017")


TALL = rle.encode(np.asfortranarray(np.ones((40, 30), np.uint8)))
NOTHING = {"size": [30, 40], "counts": [1200]}
FAULTS = {
    "outside": (
        annotation(9, 2, bbox=[25, 5, 20, 20]),
        r"annotation 9 of 2.png: the box \[25, 5, 20, 20\] reaches out",
    ),
    "left": (annotation(9, 2, bbox=[-4, 5, 20, 20]), "annotation 9 of 2.png: .* reaches outside the image of 40 x 30"),
    "flat": (annotation(9, 2, bbox=[5, 5, 20, 0]), r"annotation 9 of 2.png: the box \[5, 5, 20, 0\] is empty"),
    "short": (annotation(9, 2, bbox=[5, 5, 20]), "annotation 9 of 2.png: bbox is .* needed are four numbers"),
    "infinite": (annotation(9, 2, bbox=[5, 5, 20, float("inf")]), "annotation 9 of 2.png: bbox is .* four numbers"),
    "class": (annotation(9, 2, category_id=4), "annotation 9 of 2.png: its category_id 4 is not in the list"),
    "empty": (annotation(9, 2, segmentation=[]), "annotation 9 of 2.png: its segmentation is empty"),
    "line": (annotation(9, 2, segmentation=[[1, 1, 5, 5]]), "annotation 9 of 2.png: polygon .* three or more points"),
    "none": (annotation(9, 2, segmentation=None), "annotation 9 of 2.png: it has no segmentation"),
    "size": (annotation(9, 2, segmentation={**TALL, "counts": TALL["counts"].decode()}), "mask of .40, 30. pixels"),
    "counts": (
        annotation(9, 2, segmentation={"size": [30, 40], "counts": "zzzz0"}),
        "its run lengths do not add up to the 40 x 30 pix",
    ),
    "blank": (annotation(9, 2, segmentation=NOTHING), "annotation 9 of 2.png: its mask is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_annotation_is_named_and_its_image_can_be_skipped(folder, fault):
    bad, message = FAULTS[fault]
    write(folder, [*GOOD, bad])
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert "instances_train.json" in str(error.value)
    assert "add --skip_bad" in str(error.value)
    part = read(folder, skip_bad=True)
    assert ([entry.id for entry in part.entries], part.skipped) == ([1, 3], 1)


@pytest.mark.parametrize("seed", range(20))
def test_packed_run_lengths_are_read_as_pycocotools_reads_them(seed):
    mask = np.random.default_rng(seed).random((37, 53)) < (seed + 1) / 21
    packed = rle.encode(np.asfortranarray(mask, np.uint8))
    runs = coco.run_lengths(packed["counts"])
    ends = np.flatnonzero(np.diff(mask.T.ravel().astype(int))) + 1  # column by column, the first run of zeros
    expected = np.diff([0, *ends, mask.size]).tolist()
    assert runs == ([0, *expected] if mask[0, 0] else expected)
    assert coco.mask_fault(packed, 53, 37) == ""


def test_masks_are_only_checked_where_they_are_needed(folder):
    write(folder, [annotation(9, 2, segmentation=[])])
    entries = read(folder, masks=False).entries
    assert len(entries) == 3
    assert not any("segmentation" in known for entry in entries for known in entry.annotations)  # nor shown


def test_an_image_without_a_size_is_named(folder):
    content = json.loads((folder / "instances_train.json").read_text())
    content["images"][1]["width"] = None
    (folder / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 2: width and height are None and 30; needed are pixels"):
        read(folder)
    assert [entry.id for entry in read(folder, skip_bad=True).entries] == [1, 3]


def test_validation_needs_an_object(folder):
    write(folder, [annotation(1, 3)], "val")
    with pytest.raises(ValueError, match="no object in 1 validation image; take more with --limit_val"):
        TASK.load_data(DetectionConfig(data=f"coco={folder}", limit_val=1))


def test_a_missing_image_is_named(folder):
    (folder / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"image 2: .*2.png is missing; correct it, or add --skip_bad"):
        read(folder)
    assert read(folder, skip_bad=True).skipped == 1


@pytest.mark.parametrize("damage", ["cut", "size"])
def test_an_image_that_is_not_what_the_file_says_stops_its_use(folder, damage):
    path = folder / "images" / "3.png"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        Image.new("RGB", (30, 40)).save(path)
    data = TASK.load_data(DetectionConfig(data=f"coco={folder}"))
    with pytest.raises(ValueError, match=r"3.png (cannot be decoded|has 30 x 40 pixels).*--skip_bad"):
        list(data.val_batches([np.arange(3)]))
    skipping = TASK.load_data(DetectionConfig(data=f"coco={folder}", skip_bad=True))
    assert (skipping.train_count, skipping.val_count, skipping.skipped) == (2, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [\n1,]}', "is not JSON: .*line 2"),
        ("[]", "has no list 'images'"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"images\[0\] has no file_name, width, height",
        ),
    ],
)
def test_a_file_that_is_not_of_this_kind(folder, text, message):
    (folder / "instances_train.json").write_text(text)
    with pytest.raises(ValueError, match=r"instances_train.json.*" + message):
        read(folder)


def test_an_annotation_of_an_unlisted_image_is_named(folder):
    write(folder, [annotation(5, 99)])
    with pytest.raises(ValueError, match="annotation 5 belongs to image 99, which the file does not list"):
        read(folder)


def test_images_are_resized_with_their_boxes_and_masks(folder):
    images = CocoImages(read(folder).entries, 60, 100, masks=True)
    image, target = images[0]
    assert image.shape == (3, 60, 80)  # twice as large
    assert target["boxes"].tolist() == [[20, 10, 60, 50]]
    assert target["size"].tolist() == [30, 40]
    assert boxes_around(target["masks"].bool()).tolist() == [[20, 10, 60, 50]]
    _, without_crowd = images[2]
    assert without_crowd["labels"].tolist() == [1]
    _, without_objects = images[1]
    assert without_objects["boxes"].shape == (0, 4)
    assert without_objects["masks"].shape == (0, 60, 80)
    assert {type(value) for value in (image, *target.values())} == {torch.Tensor}
    narrow, _ = CocoImages(read(folder).entries, 60, 70, masks=True)[0]
    assert narrow.shape == (3, 52, 70)


def test_training_samples_are_a_function_of_seed_epoch_and_index(folder):
    corner = annotation(1, 1, bbox=[0, 0, 8, 6], segmentation=[[0, 0, 8, 0, 8, 6, 0, 6]])
    write(folder, [corner])
    data = SEGMENTATION.load_data(SegmentationConfig(data=f"coco={folder}", vertical_flip=True))
    seen = set()
    for epoch in range(20):
        first, again = (data.train[0, epoch, 0] for _ in range(2))
        assert torch.equal(first[0], again[0])
        masks = first[1]["masks"].bool()
        assert (boxes_around(masks) - first[1]["boxes"]).abs().max() <= 4  # mirrored alike; half of a coarse pixel
        seen.add(tuple(first[1]["boxes"][0].round().tolist()))
    assert len(seen) == 4  # both ways, or not


def test_workers_load_the_same(folder):
    alone, helped = (TASK.load_data(DetectionConfig(data=f"coco={folder}", workers=w)) for w in (0, 1))
    for a, b in zip(alone.train_batches([np.arange(3)], 0, 0), helped.train_batches([np.arange(3)], 0, 0), strict=True):
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


def test_training_and_validation_need_the_same_classes(folder):
    content = json.loads((folder / "instances_val.json").read_text())
    content["categories"][0]["name"] = "mug"
    (folder / "instances_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="training and validation have different categories"):
        TASK.load_data(DetectionConfig(data=f"coco={folder}"))


def test_training_images_can_be_held_out_to_choose_options_by(folder):
    data = TASK.load_data(DetectionConfig(data=f"coco={folder}", hold_out=1))
    assert [entry.id for entry in data.train.entries] == [2, 3]
    assert [entry.id for entry in data.val.entries] == [1]
    assert [image["id"] for image in data.info.truth["images"]] == [1]
    assert "of the training part" in TASK.notes(DetectionConfig(hold_out=1), data)["validation"]
    with pytest.raises(ValueError, match="hold_out is 3, and there are 3 training samples"):
        TASK.load_data(DetectionConfig(data=f"coco={folder}", hold_out=3))
    with pytest.raises(ValueError, match="generated ones are new every time"):
        TASK.load_data(DetectionConfig(hold_out=1))
    with pytest.raises(ValueError, match="hold_out is -1; it must not be negative"):
        DetectionConfig(hold_out=-1)


needs_data = pytest.mark.skipif(
    "OPENWORK_DATA" not in os.environ, reason="OPENWORK_DATA, the folder of test data, is not set"
)


@needs_data
def test_the_real_blood_cells():
    data = TASK.load_data(DetectionConfig(data=f"bccd={Path(os.environ['OPENWORK_DATA']) / 'bccd'}"))
    assert (data.train_count, data.val_count, data.skipped) == (205, 87, 0)
    assert list(data.info.classes) == ["RBC", "WBC", "Platelets"]
    assert len(data.info.truth["annotations"]) == 1137


@needs_data
def test_the_real_nuclei():
    data = SEGMENTATION.load_data(SegmentationConfig(data=f"dsb2018={Path(os.environ['OPENWORK_DATA']) / 'dsb2018'}"))
    assert (data.train_count, data.val_count, len(data.info.truth["annotations"])) == (430, 108, 3422)
    image, target = data.train[0, 0, 0]
    inside = target["masks"].bool()
    drawn = boxes_around(inside[inside.flatten(1).any(1)])
    assert (drawn - target["boxes"][inside.flatten(1).any(1)]).abs().max() <= 1.5
    assert image.dtype == torch.uint8


@pytest.mark.parametrize(("side", "longest", "shape"), [(20, 40, (20, 26)), (36, 40, (30, 40)), (20, 20, (15, 20))])
def test_images_are_as_large_as_both_sides_allow(folder, side, longest, shape):
    """Of 40 x 30 pixels. As long as high at most: the longer side decides alone."""
    images = CocoImages(read(folder).entries, side, longest, masks=True)
    image, target = images[0]
    assert image.shape[1:] == shape
    assert target["masks"].shape[1:] == shape
    assert target["boxes"][0].tolist() == pytest.approx([x * shape[1] / 40 for x in (10, 5, 30, 25)], rel=0.05)
