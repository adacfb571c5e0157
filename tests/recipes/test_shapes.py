"""The generator of images with shapes: pure, exact, and never the same background in training and validation."""

import numpy as np
import pytest
import torch

from openwork.recipes.objects import ShapeImages, boxes_around
from openwork.recipes.shapes import CLASSES, DRAWS, Shapes, draw_scene, outline, photographs


@pytest.fixture(scope="module")
def shapes():
    return Shapes(photographs(train=True), 40, 64)


def test_a_scene_is_a_function_of_seed_epoch_and_index(shapes):
    first, again = shapes.scene(5, 1, 2), shapes.scene(5, 1, 2)
    assert np.array_equal(first.image_SS3, again.image_SS3)
    assert np.array_equal(first.masks_NSS, again.masks_NSS)
    for other in (shapes.scene(6, 1, 2), shapes.scene(5, 2, 2), shapes.scene(5, 1, 3), shapes.scene(5)):
        assert not np.array_equal(first.image_SS3, other.image_SS3)


def test_masks_are_apart_mostly_visible_and_of_every_class(shapes):
    scenes = [shapes.scene(i, 0, 0) for i in range(40)]
    for scene in scenes:
        assert len(scene.labels_N) == len(scene.masks_NSS) >= 1
        assert scene.masks_NSS.sum(0).max() == 1  # a pixel shows one object
    counts = [len(scene.labels_N) for scene in scenes]
    assert set(np.concatenate([scene.labels_N for scene in scenes])) == set(range(1, len(CLASSES) + 1))
    assert min(counts) < 3 < max(counts)


def test_a_pixel_is_painted_where_a_mask_says_so():
    """The same draws on a black and on a white photograph: what differs is the background."""
    draws = np.random.default_rng(3).random(DRAWS)
    draws[4] = 0.5  # a light that leaves white below 255
    dark, light = (draw_scene(draws, 64, [np.full((80, 80, 3), value, np.uint8)]) for value in (0, 200))
    background = light.image_SS3.astype(int) - dark.image_SS3 > 130
    inside = dark.masks_NSS.any(0)
    assert np.array_equal(dark.masks_NSS, light.masks_NSS)
    assert (background.all(2) == inside).mean() < 0.02  # but for the soft pixels of the edges
    assert not background[inside].all(1).any()


@pytest.mark.parametrize(("kind", "area"), [(0, np.pi), (1, 4.0), (2, 2.0)])
def test_outlines_have_the_area_of_their_shape(kind, area):
    """Half axes of 0.24 and 0.12 of the side: an ellipse, a rectangle twice them, a triangle half of that."""
    draws = np.array([(kind + 0.5) / 3, 0.5, 0.5, 1.0, 0.0, 0.1])
    label, distance = outline(draws, 400)
    assert label == kind + 1
    assert (distance <= 0).sum() == pytest.approx(area * 0.24 * 0.12 * 400**2, rel=0.01)
    across = np.abs(np.diff(distance, axis=1))[(np.abs(distance) < 1)[:, 1:]]
    assert across.max() <= 1.01  # a distance: it changes by at most a pixel from pixel to pixel
    assert np.hypot(*np.gradient(distance))[np.abs(distance) < 0.7].mean() == pytest.approx(1, abs=0.1)


def test_boxes_touch_the_masks_on_all_sides(shapes):
    for index in range(10):
        _, target = ShapeImages(shapes, masks=True).train_sample(index, 0, 0)
        for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            rows, columns = mask.nonzero().unbind(1)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == [int(each) for each in corners]


def test_boxes_around_one_pixel():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 3, 5] = True
    assert boxes_around(masks).tolist() == [[0, 0, 1, 1], [5, 3, 6, 4]]


def test_training_and_validation_show_different_parts_of_the_photographs():
    train, val = photographs(train=True), photographs(train=False)
    assert [a.shape[1] + b.shape[1] for a, b in zip(train, val, strict=True)] == [640, 640]


def test_the_truth_of_validation_is_what_is_shown(shapes):
    from pycocotools import mask as rle

    images = ShapeImages(Shapes(photographs(train=False), 3, 64), masks=True)
    truth = images.truth(CLASSES)
    assert [each["name"] for each in truth["categories"]] == list(CLASSES)
    for index in range(3):
        _, target = images.val_sample(index)
        listed = [each for each in truth["annotations"] if each["image_id"] == index]
        assert [each["category_id"] for each in listed] == target["labels"].tolist()
        assert [each["bbox"][:2] for each in listed] == target["boxes"][:, :2].tolist()
        decoded = np.stack([rle.decode(each["segmentation"]) for each in listed])
        assert np.array_equal(decoded, target["masks"].numpy())
