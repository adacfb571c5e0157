"""ResNets for small images (He et al., CVPR 2016, arXiv:1512.03385, section 4.2): 3 stages of n blocks, 6n+2 layers.

Shortcuts are 1x1 convolutions where the shape changes (the paper's option B), and there is no pooling before the end.
A name that ends in "-s2" has a stem of stride 2: a quarter of the work, for slow machines.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
WIDTH = 16  # channels of the first stage


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _stage(count: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(count - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


class ResNet(nn.Module):
    """(B, channels, H, W) -> (B, classes) logits. Initial weights as in the SR-STE authors' code."""

    def __init__(
        self, depth: int, classes: int, channels: int, width: int = WIDTH, dropout: float = 0.0, stem_stride: int = 1
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, 3, stem_stride), nn.BatchNorm2d(width)
        count = (depth - 2) // 6
        self.layer1 = _stage(count, width, width, 1)
        self.layer2 = _stage(count, width, 2 * width, 2)
        self.layer3 = _stage(count, 2 * width, 4 * width, 2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # normal with std sqrt(2 / (k*k*outputs))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def depth_and_stem(name: str) -> tuple[int, int] | None:
    """Depth and stem stride: (20, 1) for "resnet20", (20, 2) for "resnet20-s2"; None for names that are not of this
    family (resnet18 and resnet50 are torchvision's)."""
    match = re.fullmatch(r"resnet(\d+)(-s2)?", name)
    return (int(match[1]), 2 if match[2] else 1) if match and int(match[1]) in DEPTHS else None
