"""GEMM: many rows of input, whose columns (tokens, pixels) are the lanes of a vector. Any pattern.

    O = outputs, K = inputs, T = slots of one output, n and m as in the pattern

Each kept weight is broadcast and multiplied with vectors of columns (csrc/gemm.inl). N slots of every group are kept,
zeros included, so all outputs have equally many, and no pointers are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openwork.layouts import cpu
from openwork.layouts.conv import ConvGeometry
from openwork.layouts.layout import Layout, Request, Vectors, check_packable, register_kind
from openwork.nm.pattern import Pattern

_CACHE = 20 * 1024  # bytes of input that a tile may take of the first-level cache, of which 32 KiB are the smallest
_CACHE_WIDE = 28 * 1024  # with 128 columns, whose sums cost more: 5 to 10 % faster on Zen 4


class GemmNumbers(NamedTuple):
    """`tile` inputs make a tile, and the last is what is left; `columns` are those that the kernel takes at once."""

    n: int
    m: int
    tile: int
    columns: int
    outputs: int
    inputs: int


@register_kind
class Gemm(Layout):
    """`values` (T * O,) float32, bfloat16, or int16 holding int8 weights; `offsets` (T * O + 1,) int16 holding uint16;
    `scales` (O,) those of int8 weights, else None.

    The order is tile, output, slot. An offset is where the input is in its tile, in bytes: a tile has a row of
    `columns` numbers (float32, or int16 for int8 weights) for each input.
    """

    name = "gemm"
    device_type = "cpu"
    weight_dtypes = cpu.WEIGHT_DTYPES
    best_rows = range(4, 2**63)
    operands = ("values", "offsets", "scales")
    Numbers = GemmNumbers
    values: Tensor
    offsets: Tensor
    scales: Tensor | None
    numbers: GemmNumbers

    @classmethod
    def refusal(cls, request: Request) -> str:
        return cpu.cpu_refusal(request)

    @classmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: Pattern, vectors: Vectors) -> Gemm:
        check_packable(weight, cls.weight_dtypes)
        (O, K), columns, int8 = weight.shape, vectors.columns, weight.dtype == torch.int8
        tile, row = tile_of(weight.dtype, pattern, columns), columns * _input_bytes(int8)
        wide = weight.to(torch.int16) if int8 else weight
        values, offsets = torch.ops.openwork.slots.default(wide, pattern.n, pattern.m, tile, row, int8)
        numbers = GemmNumbers(pattern.n, pattern.m, tile, columns, O, K)
        return cls({"values": values, "offsets": offsets, "scales": scales}, numbers)

    def unpack(self) -> Tensor:
        (O, K), m = self.shape, self.pattern.m
        int8 = self.values.dtype == torch.int16
        dense = self.values.new_zeros(O, -(-K // m) * m)
        inputs = (self.offsets.long() & 0xFFFF) // (self.numbers.columns * _input_bytes(int8))
        at = 0
        for part in dense.split(self.numbers.tile, dim=1):
            count, stored = slots_of(part.shape[1], self.pattern, int8)
            place = slice(at, at + O * stored)
            values, index = (each[place].view(O, stored)[:, :count] for each in (self.values, inputs))
            part.scatter_(1, index, values)
            at += O * stored
        dense = dense[:, :K].contiguous()
        return dense.to(torch.int8) if int8 else dense

    def on(self, vectors: Vectors) -> Gemm:
        same = self.numbers.columns == vectors.columns
        return self if same else self.pack(self.unpack(), self.scales, self.pattern, vectors)

    def check_contents(self) -> None:
        check_offsets(self.offsets, self.numbers, self.scales is not None)

    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y: Tensor = torch.ops.openwork.gemm_linear.default(x.float(), self.tensors(), bias, self.integers, relu)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def conv2d(self, x: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool) -> Tensor:
        operator = torch.ops.openwork.gemm_conv2d.default
        y: Tensor = operator(x.float(), self.tensors(), bias, self.integers, geometry.numbers, relu)
        return y if x.dtype == torch.float32 else y.to(x.dtype)


def slots_of(inputs: int, pattern: Pattern, int8: bool) -> tuple[int, int]:
    """Slots of one output in a tile of so many inputs, and how many are stored.

    >>> slots_of(24, Pattern(1, 8), int8=True)
    (3, 4)
    """
    count = inputs // pattern.m * pattern.n
    return count, count + (count % 2 if int8 else 0)


def tile_of(dtype: torch.dtype, pattern: Pattern, columns: int) -> int:
    """How many inputs make a tile, a multiple of M: so that what all outputs read stays in the cache."""
    # Of few kept weights a tile the sums cost more than cache misses: sparser weights have larger tiles (measured).
    cache = max(_CACHE_WIDE if columns > 64 else _CACHE, _CACHE * (0.25 / pattern.density) ** 1.5)
    row = columns * _input_bytes(dtype == torch.int8)
    return max(1, int(min(0xFFFF, cache) // row) // pattern.m) * pattern.m  # offsets have 16 bits


def stored_slots(numbers: GemmNumbers, int8: bool) -> int:
    """How many values a layout stores. Raises ValueError where the numbers are those of none."""
    n, m, tile, columns, O, K = numbers
    pattern, row = Pattern(n, m), columns * _input_bytes(int8)
    if min(O, K) < 1 or tile < m or tile % m or (tile - 1) * row >= 2**16:
        raise ValueError(f"{list(numbers)} makes no layout: make it with openwork.layouts.gemm")
    tiles, rest = divmod(-(-K // m) * m, tile)
    return O * (tiles * slots_of(tile, pattern, int8)[1] + slots_of(rest, pattern, int8)[1])


def check_offsets(offsets: Tensor, numbers: GemmNumbers, int8: bool) -> None:
    """Raises ValueError where an offset is not that of an input in its tile."""
    n, m, tile, columns, O, K = numbers
    row, padded, at = columns * _input_bytes(int8), -(-K // m) * m, 0
    for start in range(0, padded, tile):
        inputs = min(tile, padded - start)
        count = O * slots_of(inputs, Pattern(n, m), int8)[1]
        part = offsets[at : at + count].int() & 0xFFFF
        wrong = (part >= inputs * row) | (part % row != 0)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"offset {at + first} is {int(part[first])}; needed a multiple of {row} below {inputs * row}, a row "
                f"of its tile, for the layout {list(numbers)}: the weight is damaged, pack it again"
            )
        at += count


def _input_bytes(int8: bool) -> int:
    return 2 if int8 else 4
