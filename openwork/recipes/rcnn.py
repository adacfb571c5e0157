"""Faster R-CNN and Mask R-CNN with a feature pyramid, from torchvision's modules, on a ResNet of any depth and width.

Papers: Ren et al. 2015 (arXiv:1506.01497), Lin et al. 2017 (arXiv:1612.03144), He et al. 2017 (arXiv:1703.06870).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from openwork.recipes.images import PIXEL_MEAN, PIXEL_STD
from openwork.recipes.weights import read_weights, weights_file
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()
from torchvision.models.detection import FasterRCNN, MaskRCNN  # noqa: E402
from torchvision.models.detection.backbone_utils import BackboneWithFPN  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor  # noqa: E402
from torchvision.models.detection.rpn import AnchorGenerator  # noqa: E402
from torchvision.models.detection.transform import GeneralizedRCNNTransform  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

# The blocks of each stage (He et al. 2015, arXiv:1512.03385, table 1).
BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
_STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")
LEVELS = 5  # of the pyramid: one per stage of the ResNet and one pooled from the last
_BIN, _MASK_BIN = 7, 14  # sides of what the heads see of a region

Norm = Callable[[int], nn.Module]


class InputSized(GeneralizedRCNNTransform):
    """Normalizes and batches images that the data has resized, and leaves detections as the heads give them.

    torchvision's own resizes without antialiasing, and pastes masks at the size that the network saw; scores are
    computed at the size of the file.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        return result


def resnet_body(model: str, width: int, norm: Norm) -> nn.Sequential:
    """A ResNet without its classifier, its first stage `width` channels wide; torchvision's names and initial weights.

    >>> [name for name, _ in resnet_body("resnet18", 16, nn.BatchNorm2d).named_children()][4:]
    ['layer1', 'layer2', 'layer3', 'layer4']
    """
    block, counts = BLOCKS[model]
    body = nn.Sequential()
    body.add_module("conv1", nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False))
    body.add_module("bn1", norm(width))
    body.add_module("relu", nn.ReLU(inplace=True))
    body.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    channels = width
    for stage, count in enumerate(counts):
        planes = width * 2**stage
        body.add_module(f"layer{stage + 1}", _stage(block, channels, planes, count, 1 if stage == 0 else 2, norm))
        channels = planes * block.expansion
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _stage(
    block: type[BasicBlock | Bottleneck], channels: int, planes: int, count: int, stride: int, norm: Norm
) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != outputs:
        shortcut = nn.Sequential(nn.Conv2d(channels, outputs, 1, stride=stride, bias=False), norm(outputs))
    first = block(channels, planes, stride, shortcut, norm_layer=norm)
    return nn.Sequential(first, *[block(outputs, planes, norm_layer=norm) for _ in range(count - 1)])


def load_backbone(body: nn.Module, source: Path) -> None:
    """Weights of a classifier with torchvision's names, from a run directory or a .safetensors file, without its fc."""
    path = weights_file(source, "--backbone")
    weights = {name: weight for name, weight in read_weights(path).items() if not name.startswith("fc.")}
    if isinstance(body.get_submodule("bn1"), FrozenBatchNorm2d):  # counts no batches
        weights = {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}
    try:
        body.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"--backbone {path} does not fit; it must hold the ResNet that --model and --width name ({error})"
        ) from error


def freeze(body: nn.Sequential, trainable_layers: int) -> None:
    """Let only the last `trainable_layers` of the five stages train (5: all)."""
    for name in _STAGES[: len(_STAGES) - trainable_layers]:
        body.get_submodule(name).requires_grad_(False)
    if trainable_layers < len(_STAGES):
        body.get_submodule("bn1").requires_grad_(False)


def build_rcnn(
    body: nn.Sequential,
    *,
    classes: int,
    fpn_channels: int,
    head: int,
    anchors: Sequence[int],
    rpn_post_nms_top_n: int,
    rois_per_image: int,
    mask_convs: int = 0,
) -> FasterRCNN | MaskRCNN:
    """The detector on a ResNet: Mask R-CNN where `mask_convs` asks for a mask head of so many convolutions.

    `fpn_channels` and `head` are channels, `anchors` the side in pixels of the anchors at each level, finest first.
    `rpn_post_nms_top_n` regions of an image go on to the second stage, which trains on `rois_per_image` of them.
    """
    last = [stage[-1] for stage in (body.layer1, body.layer2, body.layer3, body.layer4)]  # type: ignore[index]
    channels = [(block.conv3 if isinstance(block, Bottleneck) else block.conv2).out_channels for block in last]  # type: ignore[union-attr]
    names = {f"layer{i + 1}": str(i) for i in range(len(channels))}
    shared = {
        "backbone": BackboneWithFPN(body, names, channels, fpn_channels),
        "rpn_anchor_generator": AnchorGenerator([(side,) for side in anchors], [(0.5, 1.0, 2.0)] * len(anchors)),
        "rpn_pre_nms_top_n_train": 2 * rpn_post_nms_top_n,
        "rpn_pre_nms_top_n_test": rpn_post_nms_top_n,
        "rpn_post_nms_top_n_train": rpn_post_nms_top_n,
        "rpn_post_nms_top_n_test": rpn_post_nms_top_n,
        "box_head": TwoMLPHead(fpn_channels * _BIN**2, head),
        "box_predictor": FastRCNNPredictor(head, classes + 1),
        "box_batch_size_per_image": rois_per_image,
    }
    if mask_convs:
        net = MaskRCNN(
            **shared,
            mask_head=MaskRCNNHeads(fpn_channels, [fpn_channels] * mask_convs, 1),
            mask_predictor=MaskRCNNPredictor(fpn_channels, fpn_channels, classes + 1),
        )
    else:
        net = FasterRCNN(**shared)
    net.transform = InputSized(0, 0, PIXEL_MEAN, PIXEL_STD)
    return net
