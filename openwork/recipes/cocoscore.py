"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Found:
    """What a network says of one image, in the pixels of its file: N objects, best first.

    boxes_N4 as x, y, width, height; labels_N from 1; masks as compressed run lengths, none in detection.
    """

    boxes_N4: np.ndarray
    scores_N: np.ndarray
    labels_N: np.ndarray
    masks: Sequence[dict[str, Any]] = ()


def average_precision(truth: dict[str, Any], found: Sequence[Found], kind: str) -> dict[str, float]:
    """ "ap" (mean over IoU 0.5 to 0.95), "ap50" and "ap75" of boxes ("bbox") or masks ("segm"), in [0, 1].

    `found` in the order of the images of `truth`. Means over the classes that occur in `truth`; at most 100 objects
    an image count.
    """
    results = [
        result
        for image, each in zip(truth["images"], found, strict=True)
        for result in _results(image["id"], each, kind)
    ]
    if not results:
        return dict.fromkeys(("ap", "ap50", "ap75"), 0.0)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        expected = COCO()
        expected.dataset = truth
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {key: float(value) for key, value in zip(("ap", "ap50", "ap75"), evaluation.stats[:3], strict=True)}


def _results(image: int, found: Found, kind: str) -> list[dict[str, Any]]:
    shapes = found.boxes_N4.tolist() if kind == "bbox" else found.masks
    key = "bbox" if kind == "bbox" else "segmentation"
    return [
        {"image_id": image, "category_id": label, "score": score, key: shape}
        for label, score, shape in zip(found.labels_N.tolist(), found.scores_N.tolist(), shapes, strict=True)
    ]
