"""What detection and instance segmentation share: their flags, data, network, loss and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from openwork.recipes import coco, rcnn
from openwork.recipes.cocoscore import Found
from openwork.recipes.config import Config, default, flag, source_of
from openwork.recipes.marks import marked, sure_of, truth_of
from openwork.recipes.objects import CocoImages, ObjectData, Sample, ShapeImages, make_data
from openwork.recipes.pasting import paste, run_lengths
from openwork.recipes.shapes import CLASSES, Shapes, photographs
from openwork.recipes.task import Picture, Task
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

_TRAIN, _VAL = 480, 100  # generated images of an epoch, and of the validation
_SHOWN = 4  # validation images in the report

# What detectors on COCO are usually trained with: mmdetection's 1x and 2x schedules, from a ResNet trained on ImageNet
# of which the first two stages and the normalization stay as they are. The paper (arXiv:2102.04010) reports 1x and 2x
# for both tasks, its recipe and its code for them were not released.
_ONCE: dict[str, Any] = {
    "model": "resnet50",
    "width": 64,
    "pyramid": 256,
    "head": 1024,
    "image_size": 800,
    "longest": 1333,
    "anchors": [32, 64, 128, 256, 512],
    "proposals": 1000,
    "regions": 512,
    "trainable_layers": 3,
    "frozen_norm": True,
    "pattern": "2:4",
    "patterns": ["2:4", "2:8"],
    "decay": 2e-4,
    "epochs": 12,
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 0.02,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "clip": 0.0,
    "schedule": "steps",
    "drops": [8, 11],
    "warmup": 0.07,  # 500 steps
    "workers": 8,
    "skip_bad": True,  # an annotation of train2017 has a box without height
    "topology_every": 1000,
    "checkpoint_every": 2000,
}
USUAL = {"paper": _ONCE, "paper-2x": {**_ONCE, "epochs": 24, "drops": [16, 22]}}


@dataclass(frozen=True)
class DetectorConfig(Config):
    """The flags of both tasks. Defaults: a tiny network that learns the generated shapes in a minute or two."""

    model: str = flag("resnet18", f"one of {', '.join(rcnn.BLOCKS)}")
    width: int = flag(16, "channels of the ResNet's first stage (64: the usual ResNet)")
    pyramid: int = flag(32, "channels of the feature pyramid")
    head: int = flag(128, "width of the box head's linear layers")
    image_size: int = flag(128, "shorter side of the images, in pixels")
    longest: int = flag(256, "longest side of the images, in pixels")
    anchors: list[int] = flag([8, 16, 32, 64, 128], "side of the anchors in pixels, one per level, finest first")
    proposals: int = flag(100, "regions of an image that reach the second stage")
    regions: int = flag(64, "regions of an image that train the second stage")
    upside_down: bool = flag(False, "mirror training images top to bottom too, for what has no up, such as cells")
    backbone: str = flag("", "weights of the ResNet to start from: a run of classification or a .safetensors file")
    trainable_layers: int = flag(5, "stages of the ResNet that train, counted from the last")
    frozen_norm: bool = flag(False, "keep the batch normalization of the ResNet as --backbone has it")

    epochs: int = default("epochs", 4)
    batch_size: int = default("batch_size", 4)
    lr: float = default("lr", 0.02)
    weight_decay: float = default("weight_decay", 1e-4)
    clip: float = default("clip", 10.0)
    warmup: float = default("warmup", 0.5)
    workers: int = flag(0, "processes that load images; without them small data sets are decoded only once")

    def check(self) -> None:
        if self.model not in rcnn.BLOCKS:
            raise ValueError(f"model {self.model!r} is not known; use one of {', '.join(rcnn.BLOCKS)}")
        if len(self.anchors) != rcnn.LEVELS:
            raise ValueError(f"anchors are {self.anchors}; the pyramid has {rcnn.LEVELS} levels, so give {rcnn.LEVELS}")
        if not 0 <= self.trainable_layers <= 5:
            raise ValueError(f"trainable_layers is {self.trainable_layers}; a ResNet has 5 stages, so give 0 to 5")
        if (self.frozen_norm or self.trainable_layers < 5) and not self.backbone:
            raise ValueError(
                "frozen_norm and trainable_layers keep parts of the ResNet as they are, which needs trained ones: "
                "add --backbone, or leave these two out"
            )
        if self.longest < self.image_size:
            raise ValueError(f"longest is {self.longest}; it must be at least image_size, {self.image_size}")


class DetectorTask(Task):
    """A network of `rcnn` on `objects`. `masks` says whether it predicts them."""

    masks: ClassVar[bool]
    eval_batch = 8

    def load_data(self, config: DetectorConfig) -> ObjectData:
        _, folder = source_of(config)
        limits: dict[str, Any] = {"limit": config.limit, "limit_val": config.limit_val, "workers": config.workers}
        if folder is None:
            shapes = [
                ShapeImages(Shapes(photographs(is_train), count, config.image_size), self.masks)
                for is_train, count in ((True, _TRAIN), (False, _VAL))
            ]
            return make_data(CLASSES, shapes[0], shapes[1], **limits)
        read = [coco.read_part(*paths, masks=self.masks, skip_bad=config.skip_bad) for paths in coco.parts(folder)]
        if read[0].classes != read[1].classes:
            raise ValueError(f"{folder}: training and validation have different categories; they must be the same")
        files = [
            CocoImages(part.entries, config.image_size, config.longest, self.masks, config.upside_down) for part in read
        ]
        return make_data(read[0].classes, files[0], files[1], skipped=sum(part.skipped for part in read), **limits)

    def build(self, config: Any, data: ObjectData) -> nn.Module:
        norm = FrozenBatchNorm2d if config.frozen_norm else nn.BatchNorm2d
        body = rcnn.resnet_body(config.model, config.width, norm)
        if config.backbone:
            rcnn.load_backbone(body, Path(config.backbone))
        rcnn.freeze(body, config.trainable_layers)
        return rcnn.build_rcnn(
            body,
            classes=len(data.classes),
            pyramid=config.pyramid,
            head=config.head,
            anchors=config.anchors,
            proposals=config.proposals,
            regions=config.regions,
            mask_convs=config.mask_convs if self.masks else 0,
        )

    def example(self, data: ObjectData) -> tuple[list[Tensor]]:
        ((sample,),) = data.val_batches([np.array([0])])
        return (images_of([sample]),)

    def loss(self, net: nn.Module, batch: Sequence[Sample]) -> Tensor:
        """The sum of the detector's losses, all with weight one, as in the papers."""
        return torch.stack(list(net(images_of(batch), [target for _, target in batch]).values())).sum()

    def records(self, net: nn.Module, batch: Sequence[Sample]) -> list[Found]:
        found = net(images_of(batch))
        return [found_in(sample, each) for sample, each in zip(batch, found, strict=True)]

    def notes(self, config: Any, data: ObjectData) -> dict[str, str]:
        objects = len(data.truth["annotations"])
        return {
            "scores": f"pycocotools {version('pycocotools')}, at most 100 detections an image",
            "validation": f"{data.val_count} images, {objects} objects, {len(data.classes)} classes",
            "MACs": "of one image; how many regions reach the heads depends on the image",
        }

    def pictures(self, config: Any, net: nn.Module, data: ObjectData) -> list[Picture]:
        """The first validation images, with what is in them and what the network is sure of."""
        shown = np.arange(min(_SHOWN, data.val_count))
        device = next(net.parameters()).device
        made = []
        for number, ((image, target),) in enumerate(data.val_batches(np.split(shown, len(shown)))):
            with torch.no_grad():
                (found,) = self.records(net, [(image.to(device), target)])
            truth, pixels = truth_of(data.truth, number), image.permute(1, 2, 0).numpy()
            drawn = [marked(pixels, each, target["size"].tolist(), data.classes) for each in (truth, sure_of(found))]
            made.append(Picture(f"validation image {number + 1}", *drawn))
        return made


def images_of(batch: Sequence[Sample]) -> list[Tensor]:
    return [image.float() / 255 for image, _ in batch]


def found_in(sample: Sample, found: dict[str, Tensor]) -> Found:
    """A detection in the pixels of the file."""
    image, target = sample
    seen, size = (image.shape[1], image.shape[2]), (int(target["size"][0]), int(target["size"][1]))
    found = {name: value.float().cpu() for name, value in found.items()}
    boxes = found["boxes"] * torch.tensor([size[1] / seen[1], size[0] / seen[0]] * 2)
    masks = run_lengths(paste(found["masks"][:, 0], found["boxes"], seen, size)) if "masks" in found else ()
    corner_and_size = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    return Found(
        corner_and_size.double().numpy(), found["scores"].double().numpy(), found["labels"].int().numpy(), masks
    )
