"""A layer as a matmul: its weight as (O, K) and back, and what a convolution's numbers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from openwork.layouts.conv import ConvGeometry, conv_rows, from_conv_rows
from openwork.nm.pattern import Pattern
from openwork.training.known_layers import is_hf_conv1d


@dataclass(frozen=True)
class LinearForm:
    """Of a linear layer; `transposed` where it keeps its weight as (K, O)."""

    transposed: bool = False
    conv: None = None

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows.t().contiguous() if self.transposed else rows


@dataclass(frozen=True)
class ConvForm:
    """Of a convolution; a one-dimensional one (`flat`) is one of images one pixel high. `channels` are those of one
    group, which in (O, K) are rounded up to M."""

    conv: ConvGeometry
    flat: bool
    channels: int
    pattern: Pattern

    def to_rows(self, weight: Tensor) -> Tensor:
        return conv_rows(weight.unsqueeze(2) if self.flat else weight, self.pattern)

    def from_rows(self, rows: Tensor) -> Tensor:
        weight = from_conv_rows(rows, self.channels, self.conv.kernel)
        return weight.squeeze(2) if self.flat else weight


Form = LinearForm | ConvForm


def form_of(module: Any, pattern: Pattern) -> Form:
    """Raises ValueError for a convolution whose padding no kernel has."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return LinearForm(transposed=is_hf_conv1d(module))
    flat = isinstance(module, nn.Conv1d)
    padding = symmetric_padding(module)
    pairs = [[1] * flat + [*module.kernel_size], [1] * flat + [*module.stride], [0] * flat + padding]
    pairs.append([1] * flat + [*module.dilation])
    conv = ConvGeometry.of([*(size for pair in pairs for size in pair), module.groups])
    return ConvForm(conv, flat, module.in_channels // module.groups, pattern)


def is_known(module: nn.Module) -> bool:
    """Whether a module is of a class whose forward is such a matmul; subclasses may do something else."""
    if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return True
    return type(module).__name__ == "Conv1D" and is_hf_conv1d(module)


def symmetric_padding(conv: nn.Conv2d | nn.Conv1d) -> list[int]:
    """The zeros added on both sides of each dim. Raises ValueError where the sides differ, or are not zeros."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r}: kernels pad with zeros")
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(size % 2 for size in both):
        raise ValueError(f"padding='same' of a kernel {conv.kernel_size} pads one side more than the other")
    return [size // 2 for size in both]
