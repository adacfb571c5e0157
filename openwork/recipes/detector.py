"""What detection and instance segmentation share: their flags, data, network, loss and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from openwork.recipes import coco, rcnn
from openwork.recipes.charts import COLORS, image_uri
from openwork.recipes.coco_metrics import Detections, detections_of
from openwork.recipes.config import Config, check_choice, default, flag, rates, source_of
from openwork.recipes.data import Data, held_out, spaced
from openwork.recipes.objects import CocoImages, ObjectInfo, Sample, object_data, shapes
from openwork.recipes.stored_result import check_facts
from openwork.recipes.task import Task, View, Visualization
from openwork.utils.counted import counted
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
from torchvision.ops import FrozenBatchNorm2d, box_convert  # noqa: E402
from torchvision.transforms.v2.functional import resize  # noqa: E402
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks  # noqa: E402

_TRAIN, _VAL = 480, 100  # generated images of an epoch, and of the validation
_SHOWN = 4  # validation images in the report
_SURE = 0.5  # the least score of a detection that is drawn
_NAMED = 20  # objects of an image with names and scores; more would hide it

# What detectors on COCO are usually trained with: mmdetection's 1x and 2x schedules, from a ResNet trained on ImageNet
# of which the first two stages and the normalization stay as they are. The paper (arXiv:2102.04010) reports 1x and 2x
# for both tasks, its recipe and its code for them were not released.
_ONCE: dict[str, Any] = {
    "model": "resnet50",
    "width": 64,
    "fpn_channels": 256,
    "head": 1024,
    "image_size": 800,
    "max_size": 1333,
    "anchors": [32, 64, 128, 256, 512],
    "rpn_post_nms_top_n": 1000,
    "rois_per_image": 512,
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
    "milestones": [8, 11],
    "warmup": 0.07,  # 500 steps
    "workers": 8,
    "skip_bad": True,  # an annotation of train2017 has a box without height
    "topology_every": 1000,
    "checkpoint_every": 2000,
}
USUAL = {"paper": _ONCE, "paper-2x": {**_ONCE, "epochs": 24, "milestones": [16, 22]}}


@dataclass(frozen=True)
class DetectorConfig(Config):
    """The flags of both tasks. Defaults: a tiny network that learns the generated shapes in a minute or two."""

    usual: ClassVar[dict[str, Any]] = {
        "batch_size": 4,
        "lr": rates(sgd=0.02),
        "warmup": 0.5,
        "image_size": 128,
        "max_size": 256,
    }

    model: str = flag("resnet18", f"one of {', '.join(rcnn.BLOCKS)}")
    width: int = flag(16, "channels of the ResNet's first stage (64: the usual ResNet)")
    fpn_channels: int = flag(32, "channels of the feature pyramid")
    head: int = flag(128, "width of the box head's linear layers")
    image_size: int = flag(None, "shorter side of the images, in pixels (default: 128, or max_size where that is less)")
    max_size: int = flag(None, "longest side of the images, in pixels (default: twice image_size)")
    anchors: list[int] = flag([8, 16, 32, 64, 128], "side of the anchors in pixels, one per level, finest first")
    rpn_post_nms_top_n: int = flag(100, "regions of an image that reach the second stage")
    rois_per_image: int = flag(64, "regions of an image that train the second stage")
    hold_out: int = flag(0, "validate on so many training images, left out of training: to choose options by")
    vertical_flip: bool = flag(False, "mirror training images top to bottom too, for what has no up, such as cells")
    backbone: str = flag("", "weights of the ResNet to start from: a run of classification or a .safetensors file")
    trainable_layers: int = flag(5, "stages of the ResNet that train, counted from the last")
    frozen_norm: bool = flag(False, "keep the batch normalization of the ResNet as --backbone has it")

    epochs: int = default("epochs", 4)
    weight_decay: float = default("weight_decay", 1e-4)
    clip: float = default("clip", 10.0)
    workers: int = flag(0, "processes that load images")

    def fitting(self) -> dict[str, Any]:
        usual = {**self.usual, **self.presets.get(self.preset, {})}
        side = self.image_size or min(usual["image_size"], self.max_size or usual["image_size"])
        longest = max(usual["max_size"] * side // usual["image_size"], side)
        return {**Config.fitting(self), "image_size": side, "max_size": longest}

    def check(self) -> None:
        check_choice("model", self.model, rcnn.BLOCKS)
        if len(self.anchors) != rcnn.LEVELS:
            raise ValueError(f"anchors are {self.anchors}; the pyramid has {rcnn.LEVELS} levels, so give {rcnn.LEVELS}")
        if not 0 <= self.trainable_layers <= 5:
            raise ValueError(f"trainable_layers is {self.trainable_layers}; a ResNet has 5 stages, so give 0 to 5")
        if (self.frozen_norm or self.trainable_layers < 5) and not self.backbone:
            raise ValueError(
                "frozen_norm and trainable_layers keep parts of the ResNet as they are, which needs trained ones: "
                "add --backbone, or leave these two out"
            )
        if self.teacher:
            raise ValueError(
                "--teacher: two detectors look at different regions, so their outputs cannot be compared; leave it out "
                "(--backbone takes what a classifier has learned)"
            )
        if self.max_size < self.image_size:
            raise ValueError(f"max_size is {self.max_size}; it must be at least image_size, {self.image_size}")


class DetectorTask(Task):
    """A network of `rcnn` on `objects`. `masks` says whether it predicts them."""

    masks: ClassVar[bool]
    eval_batch = 8

    def load_data(self, config: DetectorConfig) -> Data:
        _, folder = source_of(config)
        if folder is None:
            if config.hold_out:
                raise ValueError("hold_out is for images of --data; generated ones are new every time: leave it out")
            counts = min(config.limit or _TRAIN, _TRAIN), min(config.limit_val or _VAL, _VAL)
            return shapes(*counts, config.image_size, self.masks, config.workers)
        read = [
            coco.read_part(*paths, masks=self.masks, skip_bad=config.skip_bad, follow_links=config.follow_links)
            for paths in coco.coco_parts(folder)
        ]
        (train, classes, bad), (val, val_classes, bad_val) = read
        if classes != val_classes:
            raise ValueError(f"{folder}: training and validation have different categories; they must be the same")
        if config.hold_out:
            train, val = held_out(train, config.hold_out)
        size, val_entries = (config.image_size, config.max_size), spaced(val, config.limit_val)
        train_images = CocoImages(spaced(train, config.limit), *size, self.masks, config.vertical_flip)
        val_images = CocoImages(val_entries, *size, masks=False)
        return object_data(train_images, val_images, val_entries, classes, config.workers, bad + bad_val)

    def build(self, config: Any, data: Data) -> nn.Module:
        net: Any = self.architecture(config, data)
        if config.backbone:
            rcnn.load_backbone(net.backbone.body, Path(config.backbone))
        return net

    def architecture(self, config: Any, data: Data) -> nn.Module:
        norm = FrozenBatchNorm2d if config.frozen_norm else nn.BatchNorm2d
        body = rcnn.resnet_body(config.model, config.width, norm)
        rcnn.freeze(body, config.trainable_layers)
        return rcnn.build_rcnn(
            body,
            classes=len(data.info.classes),
            fpn_channels=config.fpn_channels,
            head=config.head,
            anchors=config.anchors,
            rpn_post_nms_top_n=config.rpn_post_nms_top_n,
            rois_per_image=config.rois_per_image,
            mask_convs=config.mask_convs if self.masks else 0,
        )

    def example(self, data: Data) -> tuple[list[Tensor]]:
        ((sample,),) = data.val_batches([np.array([0])])
        return (images_of([sample]),)

    def network_facts(self, data: Data) -> dict[str, Any]:
        return {"classes": list(data.info.classes)}

    def stand_in(self, config: DetectorConfig, facts: Mapping[str, Any]) -> Data | None:
        """Generated images."""
        if not facts:
            return None
        check_facts(config.out, facts, {"classes": [(str,)]})
        made = shapes(1, 1, config.image_size, self.masks, 0)
        return replace(made, info=ObjectInfo(facts["classes"], made.info.truth))

    def loss(self, net: nn.Module, batch: Sequence[Sample]) -> Tensor:
        """The sum of the detector's losses, all with weight one, as in the papers."""
        return torch.stack(list(net(images_of(batch), [target for _, target in batch]).values())).sum()

    def predictions(self, net: nn.Module, batch: Sequence[Sample]) -> list[Detections]:
        return [detections_of(*pair) for pair in zip(batch, net(images_of(batch)), strict=True)]

    def notes(self, config: Any, data: Data) -> dict[str, str]:
        objects = counted(len(data.info.truth["annotations"]), "object")
        objects += ", " + counted(len(data.info.classes), "class", "classes")
        held = " of the training part, left out of training (--hold_out)" if config.hold_out else ""
        return {
            "scores": f"pycocotools {version('pycocotools')}, at most 100 detections an image",
            "validation": f"{counted(data.val_count, 'image')}{held}, {objects}",
            "MACs": "of one image; how many regions reach the heads depends on the image",
        }

    def visualizations(self, config: Any, net: nn.Module, data: Data) -> list[Visualization]:
        """The first validation images, with what is in them and what the network is sure of."""
        device = next(net.parameters()).device
        samples = []
        for number in range(min(_SHOWN, data.val_count)):
            image, target = data.val[number]
            with torch.no_grad():
                (output,) = self.predictions(net, [(image.to(device), target)])
            true = true_objects(data.info.truth, number)
            views = [drawn(image, objects, target["size"], data.info.classes) for objects in (true, sure(output))]
            samples.append(Visualization(f"validation image {number + 1}", [views[0]], [views[1]]))
        return samples


def images_of(batch: Sequence[Sample]) -> list[Tensor]:
    return [image.float() / 255 for image, _ in batch]


def true_objects(truth: dict[str, Any], number: int) -> Detections:
    """What is in the image of that number, without scores."""
    image = truth["images"][number]["id"]
    listed = [annotation for annotation in truth["annotations"] if annotation["image_id"] == image]
    boxes = np.array([annotation["bbox"] for annotation in listed], float).reshape(-1, 4)
    labels = np.array([annotation["category_id"] for annotation in listed], int)
    return Detections(boxes, np.zeros(0), labels, [a["segmentation"] for a in listed if "segmentation" in a])


def sure(objects: Detections) -> Detections:
    """The detections with a score of one half or more."""
    best = (objects.scores_N >= _SURE).nonzero()[0].tolist()
    masks = [objects.masks[i] for i in best] if objects.masks else ()
    return Detections(objects.boxes_N4[best], objects.scores_N[best], objects.labels_N[best], masks)


def drawn(image: Tensor, objects: Detections, size: Tensor, classes: Sequence[str]) -> View:
    """The image with boxes and masks of a file of `size` (height, width) over it. One colour and name for each class;
    where there is only one class, a colour for each object and no names. Crowded images have no text."""
    height, width = size.tolist()
    image = resize(image, [round(side * 320 / max(image.shape[1:])) for side in image.shape[1:]])
    labels = objects.labels_N.tolist()
    kinds = [label - 1 for label in labels] if len(classes) > 1 else range(len(labels))
    colors: Any = [COLORS[kind % len(COLORS)] for kind in kinds]
    if objects.masks:
        masks = torch.from_numpy(np.stack([coco.decode_mask(mask, width, height) for mask in objects.masks]))
        resized = resize(masks[:, None].float(), list(image.shape[1:]))[:, 0] > 0.5
        image = draw_segmentation_masks(image, resized, alpha=0.4, colors=colors)
    names = [classes[label - 1] if len(classes) > 1 else "" for label in labels]
    scores = [f"{score:.2f}" for score in objects.scores_N] or [""] * len(names)
    texts = [f"{name} {score}".strip() for name, score in zip(names, scores, strict=True)]
    if labels:
        scale = torch.tensor([image.shape[2], image.shape[1]] * 2) / torch.tensor([width, height] * 2)
        boxes = box_convert(torch.from_numpy(objects.boxes_N4), "xywh", "xyxy") * scale
        shown: Any = texts if any(texts) and len(texts) <= _NAMED else None
        image = draw_bounding_boxes(image, boxes, shown, colors)
    return View(counted(len(labels), "object"), image_uri(image.permute(1, 2, 0).numpy()))
