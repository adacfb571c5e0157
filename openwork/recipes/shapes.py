"""Images made for detection: textured shapes on crops of scikit-learn's two photographs, with exact boxes and masks.

Every image is a pure function of numbers in [0, 1), so nothing is stored. Training images show the left part of the
photographs and validation images the right part, so that no background is seen twice.

Shapes: S x S pixels, N objects in an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openwork.recipes.draws import uniform

CLASSES = ("ellipse", "rectangle", "triangle")
_MOST = 6  # objects in an image
_SCENE, _OUTLINE, _OBJECT = 6, 6, 12  # draws for the background, an outline, an object
DRAWS = _SCENE + _MOST * _OBJECT
_VISIBLE = 0.6  # the least share of an object that those before it leave
_SPLIT = 0.68  # of the photographs' width is for training
_VAL_SEED = 2**40  # no --seed of a run


@dataclass(frozen=True)
class Scene:
    """image_SS3 uint8; labels_N int64 from 1; masks_NSS bool, the visible pixels of each object."""

    image_SS3: np.ndarray
    labels_N: np.ndarray
    masks_NSS: np.ndarray


def photographs(train: bool) -> list[np.ndarray]:
    """The training or the validation part of two photographs that scikit-learn brings along, each (427, W, 3) uint8."""
    from sklearn.datasets import load_sample_images

    photos = [np.asarray(image) for image in load_sample_images().images]
    splits = [int(_SPLIT * photo.shape[1]) for photo in photos]
    parts = [photo[:, :at] if train else photo[:, at:] for photo, at in zip(photos, splits, strict=True)]
    return [np.ascontiguousarray(part) for part in parts]


@dataclass(frozen=True)
class Shapes:
    """`count` scenes of `size` pixels a side: new ones for each seed and epoch; without them the validation set."""

    photos: Sequence[np.ndarray]
    count: int
    size: int

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int, seed: int = _VAL_SEED, epoch: int = 0) -> Scene:
        return draw_scene(uniform(seed, epoch, np.array([index]), DRAWS)[0], self.size, self.photos)


def draw_scene(draws: np.ndarray, size: int, photos: Sequence[np.ndarray]) -> Scene:
    """One to six objects on a crop of a photograph, painted from back to front: draws (DRAWS,) in [0, 1)."""
    which, side, down, right, light, many = draws[:_SCENE]
    image_SS3 = background(photos[int(which * len(photos))], size, side, down, right) * np.float32(0.6 + 0.6 * light)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []  # before anything hid them
    for each in draws[_SCENE:].reshape(_MOST, _OBJECT)[: 1 + int(many * _MOST)]:
        label, distance_SS = outline(each[:_OUTLINE], size)
        mask_SS = distance_SS <= 0
        left = [mask & ~mask_SS for mask in masks]
        if any(mask.sum() < _VISIBLE * area for mask, area in zip(left, areas, strict=True)):
            continue
        paint(image_SS3, distance_SS, each[_OUTLINE:], photos)
        labels.append(label)
        masks = [*left, mask_SS]
        areas.append(int(mask_SS.sum()))
    return Scene(image_SS3.clip(0, 255).astype(np.uint8), np.array(labels, np.int64), np.stack(masks))


def background(photo: np.ndarray, size: int, side: float, down: float, right: float) -> np.ndarray:
    """A square of half to all of the photograph's shorter side, resized: float32 (size, size, 3)."""
    from PIL import Image

    height, width, _ = photo.shape
    pixels = int(min(height, width) * (0.5 + 0.5 * side))
    top, left = int(down * (height - pixels + 1)), int(right * (width - pixels + 1))
    square = Image.fromarray(photo[top : top + pixels, left : left + pixels])
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR), np.float32)


def outline(draws: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """Class from 1, and the distance of each pixel's centre to the edge of the object, negative inside: (S, S)."""
    kind, x, y, length, ratio, angle = draws.tolist()
    long = size * (0.08 + 0.16 * length)
    short = long * (0.5 + 0.5 * ratio)
    at_S = np.arange(size, dtype=np.float32) + 0.5
    dx_1S, dy_S1 = (at_S - size * (0.12 + 0.76 * x))[None, :], (at_S - size * (0.12 + 0.76 * y))[:, None]
    cos, sin = math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)
    u_SS, v_SS = cos * dx_1S + sin * dy_S1, cos * dy_S1 - sin * dx_1S
    index = int(kind * len(CLASSES))
    return index + 1, (_ellipse, _rectangle, _triangle)[index](u_SS, v_SS, long, short)


def paint(image_SS3: np.ndarray, distance_SS: np.ndarray, draws: np.ndarray, photos: Sequence[np.ndarray]) -> None:
    """Paint an object into the image: a drawn colour, textured by a photograph, its edge one pixel soft."""
    which, down, right = draws[3:].tolist()
    photo = photos[int(which * len(photos))]
    rows, columns = (distance_SS < 0.5).nonzero()
    cover_P1 = (0.5 - distance_SS[rows, columns]).clip(0, 1)[:, None]
    texture_P3 = photo[
        (rows + int(down * photo.shape[0])) % photo.shape[0], (columns + int(right * photo.shape[1])) % photo.shape[1]
    ]
    colour_P3 = np.float32(0.65 * 255) * draws[:3].astype(np.float32) + np.float32(0.35) * texture_P3
    image_SS3[rows, columns] += cover_P1 * (colour_P3 - image_SS3[rows, columns])


def _ellipse(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    """To first order, exact on the edge: the equation's value over the length of its gradient."""
    root = np.sqrt((u / a) ** 2 + (v / b) ** 2) + 1e-9
    return (root - 1) * root / np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2 + 1e-12)


def _rectangle(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def _triangle(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    """Corners (0, -a), (-b, a) and (b, a)."""
    side = (2 * a * np.abs(u) - b * (v + a)) / np.hypot(2 * a, b)
    return np.maximum(v - a, side)
