"""Masks from the squares of a mask head to the pixels of a file, and their run lengths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def paste(masks: Tensor, boxes: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Masks as the head gives them, (N, 28, 28) in [0, 1], put into boxes (N, 4) of an image of `seen` pixels, at the
    file's `size`: N of bool (height, width).

    Each pixel's centre takes the interpolated value there. torchvision cuts its training masks half a pixel to the
    right and below (roi_align without `aligned`), which is undone here; its own pasting rounds boxes to pixels.
    """
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        across = (x1, x2, seen[1] / size[1], size[1], mask.shape[1])
        down = (y1, y2, seen[0] / size[0], size[0], mask.shape[0])
        (left, columns), (top, rows) = _samples(*across), _samples(*down)
        whole = np.zeros(size, bool)
        whole[top : top + len(rows), left : left + len(columns)] = (rows @ mask @ columns.T).numpy() > 0.5
        yield whole


def _samples(low: float, high: float, step: float, pixels: int, bins: int) -> tuple[int, Tensor]:
    """Along one axis: the first pixel of the file that a box reaches, and the share of each bin in each pixel from
    there on, (pixels reached, bins). A pixel of the file is `step` pixels wide."""
    first = min(max(0, math.floor(low / step)), pixels)
    last = max(first, min(pixels, math.ceil(high / step)))
    centres = (torch.arange(first, last) + 0.5) * step
    at = (centres - low - 0.5) / max(high - low, 1e-6) * bins - 0.5
    shares = (1 - (at.clamp(0, bins - 1)[:, None] - torch.arange(bins)).abs()).clamp(min=0)
    return first, shares * ((centres >= low) & (centres <= high))[:, None]


def run_lengths(masks: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    from pycocotools import mask as rle

    return [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
