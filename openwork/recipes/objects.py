"""Images and the objects in them as batches for torchvision's detectors: lists of (image, target).

image (3, H, W) uint8. target: boxes (N, 4) as x1, y1, x2, y2 in pixels of the image, labels (N,) from 1, masks
(N, H, W) uint8 where masks are trained; size (2,): height and width of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openwork.recipes import coco
from openwork.recipes.batches import loaded
from openwork.recipes.draws import uniform
from openwork.recipes.shapes import Scene, Shapes

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]
_KEPT = 2**28  # bytes of decoded images that stay in memory


class Images(Protocol):
    """The images of one part."""

    def __len__(self) -> int: ...

    def train_sample(self, index: int, seed: int, epoch: int) -> Sample: ...

    def val_sample(self, index: int) -> Sample: ...

    def limited(self, count: int) -> Images: ...

    def truth(self, classes: Sequence[str]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ObjectData:
    """The `Data` of detection and segmentation. `truth` is what scores of the validation images are computed from."""

    classes: Sequence[str]
    train: Images
    val: Images
    truth: dict[str, Any]
    workers: int = 0
    skipped: int = 0

    @property
    def train_count(self) -> int:
        return len(self.train)

    @property
    def val_count(self) -> int:
        return len(self.val)

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[list[Sample]]:
        return loaded(_Reader(self.train, seed, epoch), batches, self.workers, list)

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[list[Sample]]:
        return loaded(_Reader(self.val), batches, self.workers, list)


@dataclass(frozen=True)
class _Reader(Dataset[Sample]):
    images: Images
    seed: int | None = None  # None: validation
    epoch: int = 0

    def __getitem__(self, index: int) -> Sample:
        if self.seed is None:
            return self.images.val_sample(index)
        return self.images.train_sample(index, self.seed, self.epoch)


def make_data(
    classes: Sequence[str], train: Images, val: Images, *, limit: int, limit_val: int, workers: int, skipped: int = 0
) -> ObjectData:
    """The data with only so many images of each part (0: all)."""
    train, val = train.limited(limit), val.limited(limit_val)
    truth = val.truth(classes)
    if not truth["annotations"]:
        raise ValueError(f"there is no object in the {len(val)} validation images; take more with --limit_val")
    return ObjectData(classes, train, val, truth, workers, skipped)


@dataclass(frozen=True)
class ShapeImages:
    """Generated images; masks in the targets where `masks`."""

    shapes: Shapes
    masks: bool

    def __len__(self) -> int:
        return len(self.shapes)

    def train_sample(self, index: int, seed: int, epoch: int) -> Sample:
        return self._sample(self.shapes.scene(index, seed, epoch))

    def val_sample(self, index: int) -> Sample:
        return self._sample(self.shapes.scene(index))

    def _sample(self, scene: Scene) -> Sample:
        image = torch.from_numpy(scene.image_SS3).permute(2, 0, 1).contiguous()
        masks = torch.from_numpy(scene.masks_NSS)
        target = {"boxes": boxes_around(masks), "labels": torch.from_numpy(scene.labels_N)}
        target |= {"masks": masks.byte()} if self.masks else {}
        return image, target | {"size": torch.tensor(image.shape[1:])}

    def limited(self, count: int) -> ShapeImages:
        return replace(self, shapes=replace(self.shapes, count=min(count or len(self), len(self))))

    def truth(self, classes: Sequence[str]) -> dict[str, Any]:
        side = self.shapes.size
        entries = [coco.Entry(Path(), i, side, side, self._annotations(i)) for i in range(len(self))]
        return coco.truth(classes, entries, self.masks)

    def _annotations(self, index: int) -> list[dict[str, Any]]:
        from pycocotools import mask as rle

        scene = self.shapes.scene(index)
        boxes = _corner_and_size(boxes_around(torch.from_numpy(scene.masks_NSS)))
        return [
            {
                "bbox": box,
                "category_id": label,
                "area": int(mask.sum()),
                "segmentation": rle.encode(np.asfortranarray(mask, np.uint8)),
            }
            for box, label, mask in zip(boxes.tolist(), scene.labels_N.tolist(), scene.masks_NSS, strict=True)
        ]


def boxes_around(masks: Tensor) -> Tensor:
    """The smallest boxes of whole pixels around masks: bool (N, H, W), none empty -> float32 (N, 4).

    >>> mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    >>> mask[0, 1:3, 2] = True
    >>> boxes_around(mask)
    tensor([[2., 1., 3., 3.]])
    """
    sides = []
    for across in (2, 1):  # columns that hold a pixel give x, rows give y
        held = masks.any(3 - across).byte()
        sides.append((held.argmax(1), held.shape[1] - held.flip(1).argmax(1)))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1).float()


def _corner_and_size(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


@dataclass(frozen=True)
class CocoImages:
    """Images of files, resized: the shorter side to `side` pixels, but the longer one to at most `longest`.

    Training images are mirrored at random, upside down too where `upside_down`. Small data sets are decoded once.
    """

    entries: Sequence[coco.Entry]
    side: int
    longest: int
    masks: bool
    upside_down: bool
    kept: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.entries)

    def train_sample(self, index: int, seed: int, epoch: int) -> Sample:
        across, down = uniform(seed, epoch, np.array([index]), 2)[0] < 0.5
        image, target = self._sample(index, self.masks)
        image, target = mirrored(image, target, 2) if across else (image, target)
        return mirrored(image, target, 1) if down and self.upside_down else (image, target)

    def val_sample(self, index: int) -> Sample:
        return self._sample(index, masks=False)

    def _sample(self, index: int, masks: bool) -> Sample:
        entry = self.entries[index]
        image = self._image(index)
        height, width = image.shape[1:]
        single = [each for each in entry.annotations if not each.get("iscrowd")]  # crowds only count in scores
        boxes = torch.tensor([each["bbox"] for each in single], dtype=torch.float64).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        whole = torch.tensor([entry.width, entry.height] * 2)
        boxes = boxes.minimum(whole).clamp(min=0) * torch.tensor([width, height] * 2) / whole
        target = {"boxes": boxes.float(), "labels": torch.tensor([each["category_id"] for each in single]).long()}
        target |= {"masks": _masks(entry, single, width, height)} if masks else {}
        return image, target | {"size": torch.tensor([entry.height, entry.width])}

    def _image(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        from PIL import Image

        entry = self.entries[index]
        size = fitted(entry.width, entry.height, self.side, self.longest)
        pixels = np.asarray(coco.load_image(entry).resize(size, Image.Resampling.BILINEAR))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
        if len(self) * image.numel() <= _KEPT:
            self.kept[index] = image
        return image

    def limited(self, count: int) -> CocoImages:
        step = max(1, len(self) // count) if count else 1
        return replace(self, entries=self.entries[::step][: count or None], kept={})

    def truth(self, classes: Sequence[str]) -> dict[str, Any]:
        return coco.truth(classes, self.entries, self.masks)


def fitted(width: int, height: int, side: int, longest: int) -> tuple[int, int]:
    """Width and height resized: the shorter one `side`, or less so that the longer one is at most `longest`.

    >>> fitted(640, 480, 160, 400), fitted(640, 480, 160, 200)
    ((213, 160), (200, 150))
    """
    scale = min(side / min(width, height), longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _masks(entry: coco.Entry, annotations: Sequence[dict[str, Any]], width: int, height: int) -> Tensor:
    """Masks in the size of the resized image, each pixel from the nearest one of the file: uint8 (N, H, W)."""
    rows = ((np.arange(height) + 0.5) * entry.height / height).astype(int)[:, None]
    columns = ((np.arange(width) + 0.5) * entry.width / width).astype(int)[None, :]
    masks = [coco.decode_mask(e["segmentation"], entry.width, entry.height)[rows, columns] for e in annotations]
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)


def mirrored(image: Tensor, target: Target, axis: int) -> Sample:
    """The image and its target mirrored left to right (axis 2) or upside down (axis 1)."""
    low, high = (0, 2) if axis == 2 else (1, 3)
    boxes, side = target["boxes"].clone(), image.shape[axis]
    boxes[:, low], boxes[:, high] = side - target["boxes"][:, high], side - target["boxes"][:, low]
    flipped = {"masks": target["masks"].flip(axis)} if "masks" in target else {}
    return image.flip(axis), {**target, "boxes": boxes, **flipped}
