"""Small networks for int8 from layer to layer, and what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import openwork as ow


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module | None = None
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A dense stem, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()
        self.blocks = nn.Sequential(Block(64, 64, 1), Block(64, 128, 2))
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.relu(self.stem(x))).mean((2, 3)))


class Encoder(nn.Module):
    """Query and key of one input, GELU, a residual that is normalized, by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)
        self.up, self.down, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)

    def forward(self, *, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = (self.query(x) @ self.key(x).mT + mask).softmax(-1)
        x = self.norm(weights @ x)
        return {"y": self.norm(self.down(nn.functional.gelu(self.up(x))) + x)}


def network(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    model: Any = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    ow.project(model, "2:4", exclude=["stem"] if kind is ResNet else [])
    return model.eval()


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TOKENS = {
    "x": torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(2)),
    "mask": torch.zeros(1, 7, 7),
}
PATTERNS = ow.Selection("2:4", exclude=["stem"])
