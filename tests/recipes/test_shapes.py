"""The generator of images with shapes: pure, exact, and never the same background in training and validation."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from openwork.recipes.objects import boxes_around, shapes
from openwork.recipes.shapes import CLASSES, photographs


@pytest.fixture(scope="module")
def data():
    return shapes(40, 8, 64, True, 0)


def test_a_scene_is_a_function_of_seed_epoch_and_index(data):
    first, again = data.train[1, 2, 5], data.train[1, 2, 5]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["masks"], again[1]["masks"])
    for other in (data.train[1, 2, 6], data.train[2, 2, 5], data.train[1, 3, 5], data.val[5]):
        assert not torch.equal(first[0], other[0])


def test_masks_are_apart_and_of_every_class(data):
    scenes = [data.train.scene((0, 0, i)) for i in range(40)]
    for scene in scenes:
        assert len(scene.labels_N) == len(scene.masks_NSS) >= 1
        assert scene.masks_NSS.sum(0).max() == 1  # a pixel shows one object
    counts = [len(scene.labels_N) for scene in scenes]
    assert set(np.concatenate([scene.labels_N for scene in scenes])) == set(range(1, len(CLASSES) + 1))
    assert min(counts) < 3 < max(counts)


def test_boxes_touch_the_masks_on_all_sides(data):
    for index in range(10):
        _, target = data.train[0, 0, index]
        for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            rows, columns = mask.nonzero().unbind(1)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == [int(corner) for corner in corners]


def test_boxes_around_one_pixel():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 3, 5] = True
    assert boxes_around(masks).tolist() == [[0, 0, 1, 1], [5, 3, 6, 4]]


def test_training_and_validation_show_different_parts_of_the_photographs():
    train, val = photographs(train=True), photographs(train=False)
    assert [a.shape[1] + b.shape[1] for a, b in zip(train, val, strict=True)] == [640, 640]


def test_the_truth_of_validation_is_what_is_shown(data):
    truth = data.info.truth
    assert [category["name"] for category in truth["categories"]] == list(CLASSES)
    for index in range(3):
        _, target = data.val[index]
        listed = [annotation for annotation in truth["annotations"] if annotation["image_id"] == index]
        assert [annotation["category_id"] for annotation in listed] == target["labels"].tolist()
        assert [annotation["bbox"][:2] for annotation in listed] == target["boxes"][:, :2].tolist()
        decoded = np.stack([rle.decode(annotation["segmentation"]) for annotation in listed])
        assert np.array_equal(decoded, target["masks"].numpy())
