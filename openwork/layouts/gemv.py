"""GEMV: one row of input or a few; the lanes of a vector are outputs. M in 2, 4, 8, 16, 32.

    O = outputs, K = inputs, L = lanes, T = slots of one output, n and m as in the pattern

A vector of weights, one of each of L outputs, meets the inputs that a permutation picks from a window (csrc/gemv.inl).
N slots of every group are kept, zeros included, so all outputs have equally many, and no pointers are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.layouts import cpu
from openwork.layouts.cpu import WINDOWS
from openwork.layouts.index_words import pack_words, unpack_words
from openwork.layouts.layout import Layout, Request, Vectors, check_packable, parts, register_kind
from openwork.nm.pattern import Pattern


class GemvNumbers(NamedTuple):
    n: int
    m: int
    lanes: int
    outputs: int
    inputs: int


@register_kind
class Gemv(Layout):
    """`values` (O / L, T, L) in float32 or int8, or (O / L, T / 2, L, 2) in bfloat16, two slots side by side;
    `indices` (O / L, words, L) int32, low bits first; `scales` (O,) those of int8 weights, else None."""

    name = "gemv"
    device_type = "cpu"
    weight_dtypes = cpu.WEIGHT_DTYPES
    best_rows = range(1, 17)
    operands = ("values", "indices", "scales")
    Numbers = GemvNumbers
    values: Tensor
    indices: Tensor
    scales: Tensor | None
    numbers: GemvNumbers

    @classmethod
    def refusal(cls, request: Request) -> str:
        reason = cpu.cpu_refusal(request) or cpu.permutation_refusal(request.pattern.m)
        return reason or ("" if request.conv is None else "GEMV is for linear layers")

    @classmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: Pattern, vectors: Vectors) -> Gemv:
        check_packable(weight, cls.weight_dtypes)
        if reason := cpu.permutation_refusal(pattern.m):
            raise ValueError(reason)
        (O, K), window, lanes = weight.shape, WINDOWS[pattern.m], vectors.lanes
        values, indices = [], []
        for _, part, keep in parts(weight, pattern, -K % window, lanes):
            blocks, windows = len(part) // lanes, part.shape[1] // window
            kept = part[keep].view(blocks, lanes, -1).transpose(1, 2)
            values.append(_paired(kept) if weight.dtype == torch.bfloat16 else kept.contiguous())
            index = (torch.arange(part.shape[1], device=weight.device) % window).expand_as(keep)[keep]
            indices.append(_words(index.view(blocks, lanes, windows, -1), window))
        numbers = GemvNumbers(pattern.n, pattern.m, lanes, O, K)
        return cls({"values": torch.cat(values), "indices": torch.cat(indices), "scales": scales}, numbers)

    def unpack(self) -> Tensor:
        (O, K), window = self.shape, WINDOWS[self.pattern.m]
        slots = window // self.pattern.m * self.pattern.n
        blocks, lanes, windows = self.indices.shape[0], self.numbers.lanes, -(-K // window)
        index = _indices(self.indices, window, slots)[..., : windows * slots].reshape(blocks * lanes, windows, slots)
        values = self.values.transpose(2, 3).flatten(1, 2) if self.values.ndim == 4 else self.values
        values = values[:, : windows * slots].transpose(1, 2).reshape(blocks * lanes, windows, slots)
        dense = values.new_zeros(blocks * lanes, windows, window).scatter_(2, index, values)
        return dense.view(blocks * lanes, -1)[:O, :K].contiguous()

    def on(self, vectors: Vectors) -> Gemv:
        same = self.numbers.lanes == vectors.lanes
        return self if same else self.pack(self.unpack(), self.scales, self.pattern, vectors)

    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y: Tensor = torch.ops.openwork.gemv_linear.default(x.float(), self.tensors(), bias, self.integers, relu)
        return y if x.dtype == torch.float32 else y.to(x.dtype)


def index_bits(window: int) -> int:
    """Bits of an index in a word: as many as the permutation reads, rounded up so that words divide evenly."""
    return {4: 2, 8: 4, 16: 4, 32: 8}[window]


def words_of(windows: int, slots: int, window: int) -> int:
    """How many words hold the indices of one lane: a word holds whole windows, or a window whole words."""
    in_word = 32 // index_bits(window)
    return windows * -(-slots // in_word) if slots > in_word else -(-windows // (in_word // slots))


def _paired(values: Tensor) -> Tensor:
    """(blocks, T, L) -> (blocks, T / 2 rounded up, L, 2)."""
    blocks, count, lanes = values.shape
    even = F.pad(values, (0, 0, 0, count % 2))
    return even.reshape(blocks, -1, 2, lanes).transpose(2, 3).contiguous()


def _words(index: Tensor, window: int) -> Tensor:
    """Indices (blocks, L, windows, slots) -> int32 (blocks, words, L)."""
    bits, slots = index_bits(window), index.shape[-1]
    if slots <= 32 // bits:  # whole windows in a word
        together = 32 // bits // slots
        index = F.pad(index, (0, 0, 0, -index.shape[2] % together)).unflatten(2, (-1, together)).flatten(3)
    return pack_words(index, bits).flatten(2).transpose(1, 2).contiguous()


def _indices(words: Tensor, window: int, slots: int) -> Tensor:
    """Inverse of `_words`, spare bits left out: (blocks, words, L) -> int64 (blocks, L, slots in order)."""
    bits = index_bits(window)
    in_word = 32 // bits
    index = unpack_words(words.transpose(1, 2), bits) & (window - 1)
    whole = in_word // slots * slots if slots <= in_word else slots
    return index.unflatten(2, (-1, -(-whole // in_word) * in_word))[..., :whole].flatten(2)
