"""Augmentation: images and numbers in [0, 1) in, images out. Vectorised over the batch; no state, no generator."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(images: Tensor, draws: np.ndarray, pad: int, flip: bool) -> Tensor:
    """Pad with zeros by `pad`, crop back at a drawn place, mirror half of the images if `flip`.

    (B, C, H, W) images and (B, 3) draws (down, right, mirror) -> (B, C, H, W).
    """
    _, _, height, width = images.shape
    down, right = (torch.from_numpy((draws[:, i] * (2 * pad + 1)).astype(np.int64)) for i in (0, 1))
    columns = torch.arange(width).repeat(len(images), 1)
    if flip:
        columns = torch.where(torch.from_numpy(draws[:, 2] < 0.5)[:, None], columns.flip(1), columns)
    rows = torch.arange(height) + down[:, None]
    columns = columns + right[:, None]
    batch = torch.arange(len(images))[:, None, None]
    crops = F.pad(images, (pad,) * 4)[batch, :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()


def crop_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Inception's random resized crop: 8 to 100 % of the area, aspect 3/4 to 4/3, as (left, top, right, bottom).

    Draws (22,): area and aspect of ten attempts; the place comes from the last two. Falls back to the centre square.
    """
    for area_draw, aspect_draw in draws.reshape(-1, 2)[:-1]:
        area = width * height * (0.08 + 0.92 * area_draw)
        aspect = math.exp(math.log(3 / 4) + aspect_draw * math.log(16 / 9))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[-2] * (width - w + 1)), int(draws[-1] * (height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
