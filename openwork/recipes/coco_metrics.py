"""Detections in the pixels of a file, and COCO's average precision of them, by pycocotools.

pycocotools itself and not torchmetrics over it: that takes masks as tensors of whole images, which for a validation
set of COCO's size is a matter of minutes and of gigabytes between processes; here they travel as run lengths.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """What a network says of one image, in the pixels of its file: N objects, best first.

    boxes_N4 as x, y, width, height; labels_N from 1; masks as compressed run lengths, none in detection.
    """

    boxes_N4: np.ndarray
    scores_N: np.ndarray
    labels_N: np.ndarray
    masks: Sequence[dict[str, Any]] = ()


def detections_of(sample: tuple[Tensor, dict[str, Tensor]], output: dict[str, Tensor]) -> Detections:
    """What torchvision's detector gives for a sample, in the pixels of its file."""
    from pycocotools import mask as rle

    image, target = sample
    seen, size = (image.shape[1], image.shape[2]), (int(target["size"][0]), int(target["size"][1]))
    output = {name: value.float().cpu() for name, value in output.items()}
    boxes = output["boxes"] * torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2)
    pasted = paste(output["masks"][:, 0], output["boxes"], seen, size) if "masks" in output else ()
    masks = [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in pasted]
    corner_and_size = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().numpy()
    return Detections(corner_and_size, output["scores"].double().numpy(), output["labels"].int().numpy(), masks)


def paste(masks: Tensor, boxes: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Masks as the head gives them, (N, 28, 28) in [0, 1], put into boxes (N, 4) of an image of `seen` pixels, at the
    file's `size`: N of bool (height, width).

    Each pixel's centre takes the interpolated value there. torchvision cuts its training masks half a pixel to the
    right and below (roi_align without `aligned`), which is undone here; its own paste_masks_in_image rounds boxes to
    pixels, which costs small objects a good part of their overlap.
    """
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        left, columns = _samples(x1, x2, seen[1] / size[1], size[1], mask.shape[1])
        top, rows = _samples(y1, y2, seen[0] / size[0], size[0], mask.shape[0])
        pixels = np.zeros(size, bool)
        pixels[top : top + len(rows), left : left + len(columns)] = (rows @ mask @ columns.T).numpy() > 0.5
        yield pixels


def _samples(low: float, high: float, step: float, pixels: int, bins: int) -> tuple[int, Tensor]:
    """Along one axis: the first pixel of the file that a box reaches, and the share of each bin in each pixel from
    there on, (pixels reached, bins). A pixel of the file is `step` pixels wide."""
    first = min(max(0, math.floor(low / step)), pixels)
    last = max(first, min(pixels, math.ceil(high / step)))
    centres = (torch.arange(first, last) + 0.5) * step
    at = (centres - low - 0.5) / max(high - low, 1e-6) * bins - 0.5
    shares = (1 - (at.clamp(0, bins - 1)[:, None] - torch.arange(bins)).abs()).clamp(min=0)
    return first, shares * ((centres >= low) & (centres <= high))[:, None]


def average_precision(truth: dict[str, Any], detections: Sequence[Detections], kind: str) -> dict[str, float]:
    """ "ap" (mean over IoU 0.5 to 0.95), "ap50" and "ap75" of boxes ("bbox") or masks ("segm"), in [0, 1].

    `detections` in the order of the images of `truth`. Means over the classes that occur in `truth`; at most 100
    objects an image count.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = []
    for image, objects in zip(truth["images"], detections, strict=True):
        shapes = objects.boxes_N4.tolist() if kind == "bbox" else objects.masks
        key = "bbox" if kind == "bbox" else "segmentation"
        results += [
            {"image_id": image["id"], "category_id": label, "score": score, key: shape}
            for label, score, shape in zip(objects.labels_N.tolist(), objects.scores_N.tolist(), shapes, strict=True)
        ]
    if not results:
        return dict.fromkeys(("ap", "ap50", "ap75"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        expected = COCO()
        expected.dataset = truth
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {key: float(value) for key, value in zip(("ap", "ap50", "ap75"), evaluation.stats[:3], strict=True)}
