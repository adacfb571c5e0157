"""Images made for detection: ellipses, rectangles and triangles on crops of scikit-learn's two photographs.

An image is a function of (seed, epoch, index), and nothing is stored. Training images show the left part of the
photographs and validation images the right part, so that no background is seen twice.

Shapes: S x S pixels, N objects in an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CLASSES = ("ellipse", "rectangle", "triangle")
_MOST = 6  # objects in an image
_VISIBLE = 0.6  # the least share of an object that those before it leave
_SPLIT = 0.68  # of the photographs' width is for training


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
    return [photo[:, :at] if train else photo[:, at:] for photo, at in zip(photos, splits, strict=True)]


def draw_scene(draw: np.random.Generator, size: int, photos: Sequence[np.ndarray]) -> Scene:
    """One to six objects on a crop of a photograph, painted from back to front."""
    image_SS3 = _background(draw, size, photos)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []  # before anything hid them
    for _ in range(draw.integers(1, _MOST + 1)):
        label, mask_SS, colour = int(draw.integers(1, 4)), _outline(draw, size), draw.uniform(0, 255, 3)
        mask_SS = mask_SS[label - 1]
        left = [mask & ~mask_SS for mask in masks]
        if any(mask.sum() < _VISIBLE * area for mask, area in zip(left, areas, strict=True)):
            continue
        image_SS3[mask_SS] = 0.65 * colour + 0.35 * image_SS3[mask_SS]
        labels.append(label)
        masks = [*left, mask_SS]
        areas.append(int(mask_SS.sum()))
    return Scene(image_SS3.clip(0, 255).astype(np.uint8), np.array(labels), np.stack(masks))


def _background(draw: np.random.Generator, size: int, photos: Sequence[np.ndarray]) -> np.ndarray:
    """A square of half to all of a photograph's shorter side, resized, lighter or darker: float32 (size, size, 3)."""
    from PIL import Image

    photo = photos[int(draw.integers(len(photos)))]
    height, width, _ = photo.shape
    side = int(min(height, width) * draw.uniform(0.5, 1))
    top, left = draw.integers(height - side + 1), draw.integers(width - side + 1)
    square = Image.fromarray(np.ascontiguousarray(photo[top : top + side, left : left + side]))
    resized = square.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32) * np.float32(draw.uniform(0.6, 1.2))


def _outline(draw: np.random.Generator, size: int) -> np.ndarray:
    """The pixels of one shape as each of the classes: bool (3, S, S). Half axes long and short, at an angle."""
    long = size * draw.uniform(0.08, 0.24)
    short = long * draw.uniform(0.5, 1)
    x, y = draw.uniform(0.12, 0.88, 2) * size
    angle = draw.uniform(0, 2 * math.pi)
    at_S = np.arange(size) + 0.5
    dx, dy = (at_S - x)[None, :], (at_S - y)[:, None]
    u, v = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
    u, v = u / long, v / short
    return np.stack([u**2 + v**2 <= 1, np.maximum(abs(u), abs(v)) <= 1, (abs(v) <= 1) & (2 * abs(u) <= v + 1)])
