import numpy as np
import pytest
import torch

from openwork.recipes.augment import crop_box, shift_and_flip


@pytest.fixture
def images():
    return torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)


def test_the_middle_draw_changes_nothing(images):
    assert torch.equal(shift_and_flip(images, np.full((2, 3), 0.5), 1, True), images)


def test_a_shift_moves_each_image_by_its_own_draw(images):
    draws = np.array([[0.0, 0.5, 0.9], [0.99, 0.0, 0.9]])
    shifted = shift_and_flip(images, draws, 1, False)
    assert torch.equal(shifted[0, :, 1:], images[0, :, :-1])
    assert not shifted[0, :, 0].any()
    assert torch.equal(shifted[1, :, :-1, 1:], images[1, :, 1:, :-1])


def test_a_low_draw_mirrors_only_if_asked(images):
    draws = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.9]])
    mirrored = shift_and_flip(images, draws, 1, True)
    assert torch.equal(mirrored[0], images[0].flip(-1))
    assert torch.equal(mirrored[1], images[1])
    assert torch.equal(shift_and_flip(images, draws, 1, False), images)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (50, 400), (7, 7), (1, 1)])
def test_crops_lie_inside_the_image(width, height):
    for draws in np.random.default_rng(0).random((200, 22)):
        left, top, right, bottom = crop_box(width, height, draws)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_crops_cover_small_and_large_areas():
    boxes = [crop_box(100, 100, draws) for draws in np.random.default_rng(0).random((500, 22))]
    areas = [(right - left) * (bottom - top) / 10_000 for left, top, right, bottom in boxes]
    assert 0.07 < min(areas) < 0.12
    assert max(areas) > 0.9
