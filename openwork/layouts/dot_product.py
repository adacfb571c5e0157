"""Dot products of short numbers: inputs as short as the weights, bfloat16 in pairs or int8 in quads.

    O = outputs, K = inputs, L = lanes, n and m as in the pattern

The lanes of a vector are outputs. For each step one instruction multiplies two bfloat16 or four int8 of each output by
inputs that a permutation picks from a window of one vector, and adds (csrc/dot_product.inl). M in 2, 4, 8, 16, and 32
with even N. N slots of every group are kept, zeros included, so all outputs have equally many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.layouts import cpu
from openwork.layouts.conv import ConvGeometry
from openwork.layouts.cpu import WINDOWS
from openwork.layouts.gemm import Gemm
from openwork.layouts.layout import Layout, Request, Vectors, check_packable, parts, register_kind
from openwork.nm.pattern import Pattern

_TOGETHER = {torch.bfloat16: 2, torch.int8: 4}  # numbers in 32 bits


class DotProductNumbers(NamedTuple):
    n: int
    m: int
    lanes: int
    outputs: int
    inputs: int


@register_kind
class DotProduct(Layout):
    """`values` (O / L, windows, steps, L, 2) bfloat16 or (O / L, windows, steps, L, 4) int8: a window is one vector of
    inputs, a step the slots that one instruction multiplies and adds. `indices` uint8, where the input of each is in
    its window: like `values`, but for bfloat16 those of two steps side by side. `scales` (O,) those of int8."""

    name = "dot_product"
    device_type = "cpu"
    weight_dtypes = (torch.bfloat16, torch.int8)
    best_rows = range(1, 2**63)
    times_channels_last = True
    operands = ("values", "indices", "scales")
    Numbers = DotProductNumbers
    values: Tensor
    indices: Tensor
    scales: Tensor | None
    numbers: DotProductNumbers

    @classmethod
    def refusal(cls, request: Request) -> str:
        """It rounds no more than the layer does: its inputs are bfloat16 where the layer's are, and int8 sums are exact
        in every kernel."""
        if reason := cpu.cpu_refusal(request):
            return reason
        short = request.weight_dtype == torch.int8 or request.weight_dtype == request.dtype == torch.bfloat16
        if not short:
            return "dot products are for layers in bfloat16, and for weights in int8"
        if request.conv is not None and request.conv.groups > 1:
            return f"a convolution in {request.conv.groups} groups: dot products are for one"
        if not request.vectors.dot_product:
            return "this CPU has no dot products of bfloat16 and int8 (AVX-512 with VBMI and VNNI)"
        return step_refusal(request.weight_dtype, request.pattern, request.vectors.lanes)

    @classmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: Pattern, vectors: Vectors) -> DotProduct:
        (O, K), lanes = weight.shape, vectors.lanes
        sizes = sizes_of(weight.dtype, pattern, lanes)
        check_packable(weight, cls.weight_dtypes)
        values, indices = [], []
        for _, part, keep in parts(weight, pattern, -K % sizes.window, lanes):
            index = torch.arange(part.shape[1], dtype=torch.uint8, device=weight.device) % sizes.window
            by_window = (-1, lanes, part.shape[1] // sizes.window, sizes.slots)
            kept, places = (_steps(each[keep].view(by_window), sizes) for each in (part, index.expand_as(keep)))
            values.append(kept.contiguous())
            indices.append(_two_steps(places) if weight.dtype == torch.bfloat16 else places.contiguous())
        numbers = DotProductNumbers(pattern.n, pattern.m, lanes, O, K)
        return cls({"values": torch.cat(values), "indices": torch.cat(indices), "scales": scales}, numbers)

    def unpack(self) -> Tensor:
        (O, K), lanes = self.shape, self.numbers.lanes
        sizes = sizes_of(self.values.dtype, self.pattern, lanes)
        indices = self.indices
        if self.values.dtype == torch.bfloat16:
            indices = indices.view(*indices.shape[:2], -1, lanes * 2, 2).transpose(-1, -2)
            indices = indices.flatten(2, 3)[:, :, : sizes.steps].reshape(self.values.shape)
        values, index = (each.permute(0, 3, 1, 2, 4).flatten(3) for each in (self.values, indices))
        dense = values.new_zeros(*values.shape[:3], sizes.window).scatter_(3, index.long() % sizes.window, values)
        return dense.flatten(2).flatten(0, 1)[:O, :K].contiguous()

    @classmethod
    def multiplies(cls, weight_dtype: torch.dtype) -> tuple[torch.dtype, int]:
        return (torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32), _TOGETHER[weight_dtype]

    @classmethod
    def stand_in(cls, vectors: Vectors) -> type[Layout]:
        return cls if vectors.dot_product else Gemm

    def on(self, vectors: Vectors) -> Layout:
        kind = self.stand_in(vectors)
        if kind is type(self) and self.numbers.lanes == vectors.lanes:
            return self
        return kind.pack(self.unpack(), self.scales, self.pattern, vectors)

    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        operator = torch.ops.openwork.dot_product_linear.default
        y: Tensor = operator(self._input(x), self.tensors(), bias, self.integers, relu)
        return y.to(x.dtype)

    def conv2d(self, x: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool) -> Tensor:
        operator = torch.ops.openwork.dot_product_conv2d.default
        y: Tensor = operator(self._input(x), self.tensors(), bias, self.integers, geometry.numbers, relu)
        return y.to(x.dtype)

    def _input(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16 if self.scales is None else torch.float32)


@dataclass(frozen=True)
class Sizes:
    """Inputs of a window; slots of one output in it; steps that take them, `together` a step."""

    window: int
    slots: int
    steps: int
    together: int


def sizes_of(dtype: torch.dtype, pattern: Pattern, lanes: int) -> Sizes:
    """Raises ValueError where there is no such layout.

    >>> sizes_of(torch.bfloat16, Pattern(2, 4), lanes=16)
    Sizes(window=32, slots=16, steps=8, together=2)
    """
    if reason := step_refusal(dtype, pattern, lanes):
        raise ValueError(reason)
    together = _TOGETHER[dtype]
    window = lanes * together
    slots = window // pattern.m * pattern.n
    return Sizes(window, slots, slots // together, together)


def step_refusal(dtype: torch.dtype, pattern: Pattern, lanes: int) -> str:
    """Why the slots of a window do not fill whole steps; empty where they do.

    >>> step_refusal(torch.int8, Pattern(1, 16), lanes=16), step_refusal(torch.int8, Pattern(1, 32), lanes=16) == ""
    ('', False)
    """
    together = _TOGETHER.get(dtype, 0)
    window = lanes * together
    whole = together and pattern.m in WINDOWS and window % pattern.m == 0
    if whole and window // pattern.m * pattern.n % together == 0:
        return ""
    return (
        f"{dtype} at {pattern} fills no steps of dot products; needed bfloat16 or int8, M one of "
        f"{', '.join(map(str, WINDOWS))}, and slots that fill whole steps"
    )


def _steps(slots: Tensor, sizes: Sizes) -> Tensor:
    """(blocks, L, windows, slots) -> (blocks, windows, steps, L, together)."""
    return slots.unflatten(3, (sizes.steps, sizes.together)).permute(0, 2, 3, 1, 4)


def _two_steps(indices: Tensor) -> Tensor:
    """(blocks, windows, steps, L, 2) -> (blocks, windows, steps / 2 rounded up, L, 2, 2): the last those of two
    steps."""
    even = F.pad(indices, (0, 0, 0, 0, 0, indices.shape[2] % 2))
    return even.unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3).contiguous()
