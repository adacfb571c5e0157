"""Objects, true and found, drawn over a validation image for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openwork.recipes.cocoscore import Found
from openwork.recipes.overlay import Marked, overlay

_SURE = 0.5  # the least score of a detection that is drawn
_NAMED = 20  # objects of an image with names and scores; more would hide it


def truth_of(truth: dict[str, Any], number: int) -> Found:
    """What is in the image of that number, without scores."""
    image = truth["images"][number]["id"]
    listed = [each for each in truth["annotations"] if each["image_id"] == image]
    boxes = np.array([each["bbox"] for each in listed], float).reshape(-1, 4)
    labels = np.array([each["category_id"] for each in listed], int)
    return Found(boxes, np.zeros(0), labels, [each["segmentation"] for each in listed if "segmentation" in each])


def sure_of(found: Found) -> Found:
    """The detections with a score of one half or more."""
    sure = (found.scores_N >= _SURE).nonzero()[0].tolist()
    masks = [found.masks[i] for i in sure] if found.masks else ()
    return Found(found.boxes_N4[sure], found.scores_N[sure], found.labels_N[sure], masks)


def marked(image_HW3: np.ndarray, objects: Found, size: Sequence[int], classes: Sequence[str]) -> str:
    """The image with boxes and masks of a file of `size` (height, width) over it. One colour and name for each class;
    where there is only one class, a colour for each object and no names. Crowded images have no text."""
    scale = image_HW3.shape[1] / size[1], image_HW3.shape[0] / size[0]
    drawn = []
    for i, (box, label) in enumerate(zip(objects.boxes_N4.tolist(), objects.labels_N.tolist(), strict=True)):
        text = [classes[label - 1]] if len(classes) > 1 else []
        text += [f"{objects.scores_N[i]:.2f}"] if len(objects.scores_N) else []
        sides = [side * scale[axis % 2] for axis, side in enumerate(box)]
        mask = _resized(objects.masks[i], image_HW3.shape) if objects.masks else None
        drawn.append(
            Marked(
                sides,
                label - 1 if len(classes) > 1 else i,
                " ".join(text) if len(objects.labels_N) <= _NAMED else "",
                mask,
            )
        )
    return overlay(image_HW3, drawn)


def _resized(mask: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image
    from pycocotools import mask as rle

    return np.asarray(Image.fromarray(rle.decode(mask)).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
