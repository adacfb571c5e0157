"""Images and the objects in them for torchvision's detectors: samples (image, target), generated or from COCO's files.

image (3, H, W) uint8. target: boxes (N, 4) as x1, y1, x2, y2 in pixels of the image, labels (N,) from 1, masks
(N, H, W) uint8 where masks are trained; size (2,): height and width of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openwork.recipes import coco
from openwork.recipes.data import Data
from openwork.recipes.draws import sample_seed
from openwork.recipes.shapes import CLASSES, Scene, draw_scene, photographs
from openwork.utils.counted import counted
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
from torchvision import tv_tensors  # noqa: E402
from torchvision.ops import masks_to_boxes  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

Sample = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class ObjectInfo:
    """Names of the classes, and what metrics of the validation images are computed from, as pycocotools takes it."""

    classes: Sequence[str]
    truth: dict[str, Any]


def object_data(
    train: Any, val: Any, entries: Sequence[coco.CocoImage], classes: Sequence[str], workers: int, skipped: int = 0
) -> Data:
    """The samples, and what metrics of the validation images are computed from: their entries."""
    truth = coco.truth_of(classes, entries)
    if not truth["annotations"]:
        raise ValueError(f"there is no object in {counted(len(val), 'validation image')}; take more with --limit_val")
    return Data(train, val, list, workers, skipped, info=ObjectInfo(classes, truth))


@dataclass(frozen=True)
class ShapeImages(Dataset[Sample]):
    """`count` generated images of `size` pixels a side; masks in the targets where `masks`."""

    photos: Sequence[np.ndarray]
    count: int
    size: int
    masks: bool

    def __len__(self) -> int:
        return self.count

    def scene(self, key: Any) -> Scene:
        numbers = (1, key) if isinstance(key, int) else (0, *key)  # validation, training
        return draw_scene(np.random.default_rng(numbers), self.size, self.photos)

    def __getitem__(self, key: Any) -> Sample:
        scene = self.scene(key)
        image = torch.from_numpy(scene.image_SS3).permute(2, 0, 1).contiguous()
        masks = torch.from_numpy(scene.masks_NSS)
        target = {"boxes": boxes_around(masks), "labels": torch.from_numpy(scene.labels_N)}
        target |= {"masks": masks.byte()} if self.masks else {}
        return image, {**target, "size": torch.tensor(image.shape[1:])}

    def entry(self, index: int) -> coco.CocoImage:
        """A validation image as a json file would describe it."""
        from pycocotools import mask as rle

        scene = self.scene(index)
        corners = boxes_around(torch.from_numpy(scene.masks_NSS)).tolist()
        listed = [
            {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": label, "area": int(mask.sum())}
            | ({"segmentation": rle.encode(np.asfortranarray(mask, np.uint8))} if self.masks else {})
            for (x1, y1, x2, y2), label, mask in zip(corners, scene.labels_N.tolist(), scene.masks_NSS, strict=True)
        ]
        return coco.CocoImage(Path(), index, self.size, self.size, listed)


def boxes_around(masks: Tensor) -> Tensor:
    """The smallest boxes of whole pixels around masks: bool (N, H, W), none empty -> float32 (N, 4).

    >>> mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    >>> mask[0, 1:3, 2] = True
    >>> boxes_around(mask)
    tensor([[2., 1., 3., 3.]])
    """
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # which counts the last pixel as the edge


def shapes(count: int, count_val: int, size: int, masks: bool, workers: int) -> Data:
    """Generated images: new ones in each epoch, for validation always the same."""
    train, val = (ShapeImages(photographs(t), n, size, masks) for t, n in ((True, count), (False, count_val)))
    return object_data(train, val, [val.entry(index) for index in range(len(val))], CLASSES, workers)


@dataclass(frozen=True)
class CocoImages(Dataset[Sample]):
    """Images of files, decoded when they are used; masks in the targets where `masks`.

    The shorter side is resized to `side` pixels, but the longer one to at most `max_size`. Training images are mirrored
    at random, top to bottom too where `vertical_flip`.
    """

    entries: Sequence[coco.CocoImage]
    side: int
    max_size: int
    masks: bool
    vertical_flip: bool = False

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: Any) -> Sample:
        if isinstance(key, int):
            return self._sample(self.entries[key])
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(0.5 if self.vertical_flip else 0)]
        with sample_seed(*key):
            return self._sample(self.entries[key[2]], flips)

    def _sample(self, entry: coco.CocoImage, flips: Sequence[Any] = ()) -> Sample:
        single = [known for known in entry.annotations if not known.get("iscrowd")]  # crowds only count in metrics
        size = entry.height, entry.width
        boxes = torch.tensor([known["bbox"] for known in single], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=size),
            "labels": torch.tensor([known["category_id"] for known in single]).long(),
        }
        picture = coco.load_image(entry)  # first: masks are as large as the json file says, and this holds it to that
        if self.masks:
            decoded = [coco.decode_mask(known["segmentation"], entry.width, entry.height) for known in single]
            target["masks"] = tv_tensors.Mask(
                np.stack(decoded) if decoded else torch.zeros(0, *size, dtype=torch.uint8)
            )
        side = self.side if self.side < self.max_size else None  # equal: the longer side alone decides, as v2 has it
        resize = [v2.Resize(side, max_size=self.max_size), v2.ConvertBoundingBoxFormat("XYXY")]
        transform = v2.Compose([*resize, v2.ClampBoundingBoxes(), *flips, v2.ToPureTensor()])
        image, target = transform(v2.functional.pil_to_tensor(picture), target)
        return image, {**target, "size": torch.tensor(size)}
