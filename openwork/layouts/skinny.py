"""Skinny GEMM on a GPU: up to 16 rows of input, any pattern.

    O = outputs, OP = O rounded up to 16, K = inputs, G = groups of one output, N = slots of a group

One token at a time, a layer costs what reading its weight costs, so fewer bytes are less time, whatever the pattern.
Lanes are outputs: what neighbours read lies side by side. Two kernels read it (kernels/cuda/triton/skinny.py): one
gathers the inputs of each kept weight, the other expands tiles of the weight to dense ones for the tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.layouts.index_words import pack_words, unpack_words
from openwork.layouts.layout import Layout, Request, Vectors, check_packable, parts, register_kind
from openwork.nm.pattern import Pattern

ROWS = 16
"""The most rows of input that the kernels take."""


class SkinnyNumbers(NamedTuple):
    n: int
    m: int
    outputs: int
    inputs: int


class Skinny(Layout):
    """`values` (N, G, OP) in float16 or bfloat16; `indices` (words, OP) int32: those of slots in the order of groups,
    `index_bits` each, low bits first. `kernel_bias` (O,) in the dtype of the values."""

    device_type = "cuda"
    weight_dtypes = (torch.float16, torch.bfloat16)
    best_rows = range(1, ROWS + 1)
    operands = ("values", "indices")
    Numbers = SkinnyNumbers
    values: Tensor
    indices: Tensor
    kernel_bias: Tensor | None
    numbers: SkinnyNumbers

    @classmethod
    def refusal(cls, request: Request) -> str:
        if request.weight_dtype not in cls.weight_dtypes:
            return f"skinny GEMM is for float16 and bfloat16, not {request.weight_dtype}"
        if request.conv is not None:
            return "skinny GEMM is for linear layers"
        return "" if request.rows <= ROWS else f"skinny GEMM is for up to {ROWS} rows"

    @classmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: Pattern, vectors: Vectors) -> Skinny:
        check_packable(weight, cls.weight_dtypes)
        (O, K), m = weight.shape, pattern.m
        values, indices = [], []
        for _, part, keep in parts(weight, pattern, -K % m, 16):
            slots = (len(part), -1, pattern.n)
            index = (torch.arange(part.shape[1], device=weight.device) % m).expand_as(keep)[keep]
            values.append(part[keep].view(slots).permute(2, 1, 0))
            indices.append(pack_words(index.view(len(part), -1), skinny_index_bits(pattern)).t())
        numbers = SkinnyNumbers(pattern.n, m, O, K)
        tensors = {"values": torch.cat(values, 2).contiguous(), "indices": torch.cat(indices, 1).contiguous()}
        return cls({**tensors, "kernel_bias": None}, numbers)

    def unpack(self) -> Tensor:
        m, (O, K) = self.pattern.m, self.shape
        N, G, OP = self.values.shape
        index = unpack_words(self.indices.t(), skinny_index_bits(self.pattern))[:, : G * N].view(OP, G, N)
        dense = self.values.new_zeros(OP, G, m).scatter_(2, index, self.values.permute(2, 1, 0))
        return dense.view(OP, G * m)[:O, :K].contiguous()

    def take_bias(self, bias: Tensor | None) -> None:
        self.kernel_bias = None if bias is None else bias.to(self.values.dtype)

    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.values.dtype)
        if len(rows) > ROWS:
            y = F.linear(rows, self.unpack(), self.kernel_bias)
            y = y.relu() if relu else y
        else:
            operator = getattr(torch.ops.openwork, f"{self.name}_linear").default
            y = operator(rows, self.tensors(), self.kernel_bias, self.integers, relu)
        return y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)


@register_kind
class SkinnyGather(Skinny):
    """Work for kept weights alone: best for few rows and sparse patterns."""

    name = "skinny_gather"


@register_kind
class SkinnyExpand(Skinny):
    """Work that does not grow with the rows: dense tiles made in registers, multiplied on tensor cores."""

    name = "skinny_expand"


def skinny_index_bits(pattern: Pattern) -> int:
    """Bits of one index.

    >>> [skinny_index_bits(Pattern(*each)) for each in ((2, 4), (1, 5), (1, 1))]
    [2, 3, 1]
    """
    return max(1, (pattern.m - 1).bit_length())


def check_skinny(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: SkinnyNumbers) -> None:
    """Raises ValueError unless the tensors are those of a layout, and `x` is rows for it: kernels look at nothing."""
    n, m, O, K = numbers
    values, indices = packed
    pattern, OP = Pattern(n, m), -(-O // 16) * 16
    G, in_word = -(-K // m), 32 // skinny_index_bits(pattern)
    shapes = tuple(values.shape) == (n, G, OP) and tuple(indices.shape) == (-(-G * n // in_word), OP)
    whole = values.is_contiguous() and indices.is_contiguous() and indices.dtype == torch.int32
    if not (shapes and whole and values.dtype in Skinny.weight_dtypes):
        found = f"values {tuple(values.shape)} of {values.dtype} and indices {tuple(indices.shape)} of {indices.dtype}"
        raise ValueError(f"{found} do not fit the layout {list(numbers)}: make them with openwork.layouts.skinny")
    if x.ndim != 2 or x.shape[1] != K or x.dtype != values.dtype:
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype}; needed (B, {K}) of {values.dtype}")
    if bias is not None and (tuple(bias.shape) != (O,) or bias.dtype != values.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} of {bias.dtype}; needed ({O},) of {values.dtype}")
