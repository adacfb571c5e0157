"""The slots of a weight as an operator: what kernels store of an N:M weight, and where its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.layouts.layout import parts
from openwork.nm.pattern import Pattern
from openwork.ops.library import library, reference

library.define("slots(Tensor weight, int n, int m, int tile, int step, bool even) -> (Tensor, Tensor)")


def stored_of(K: int, n: int, m: int, tile: int, even: bool) -> list[int]:
    """How many slots of an output are stored in each tile."""
    groups = -(-K // m)
    counts = [min(tile // m, groups - first) * n for first in range(0, groups, tile // m)]
    return [count + (count % 2 if even else 0) for count in counts]


@reference("slots")
def slots_reference(weight: Tensor, n: int, m: int, tile: int, step: int, even: bool) -> tuple[Tensor, Tensor]:
    """What kernels store of an N:M weight (O, K): the values (S,) of N slots of every group, which are all weights that
    are not 0, then zeros at the lowest other places; and their offsets (S + 1,), int16 that hold uint16, the last of
    them 0, for kernels that read ahead.

    The order is tile, output, slot. `tile` inputs, a multiple of m, make a tile; an offset is the place of an input in
    its tile, times `step`. `even`: in each tile an output has an even number of slots, filled up with 0. Raises
    ValueError where a group holds too many.

    >>> weight = torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 0.0, 0.0, 0.0]])
    >>> torch.ops.openwork.slots(weight, 2, 4, 4, 1, False)
    (tensor([5., 6., 7., 0.]), tensor([1, 3, 0, 1, 0], dtype=torch.int16))
    """
    pattern, (O, K) = Pattern(n, m), weight.shape
    inputs = torch.arange(-(-K // m) * m, device=weight.device)
    counts, stored = stored_of(K, n, m, tile, False), stored_of(K, n, m, tile, even)
    total = O * sum(stored)
    values, offsets = weight.new_zeros(total), weight.new_zeros(total + 1, dtype=torch.int16)
    for first, part, keep in parts(weight, pattern, -K % m):
        at, outputs = 0, slice(first, first + len(part))
        for some, kept, count, size in zip(part.split(tile, 1), keep.split(tile, 1), counts, stored, strict=True):
            place = slice(at, at + O * size)
            values[place].view(O, size)[outputs, :count] = some[kept].view(-1, count)
            offset = inputs[: some.shape[1]] * step
            wrapped = torch.where(offset < 2**15, offset, offset - 2**16).to(torch.int16)
            offsets[place].view(O, size)[outputs, :count] = wrapped.expand_as(kept)[kept].view(-1, count)
            at += O * size
    return values, offsets


@torch.library.register_fake("openwork::slots")
def _(weight: Tensor, n: int, m: int, tile: int, step: int, even: bool) -> tuple[Tensor, Tensor]:
    total = weight.shape[0] * sum(stored_of(weight.shape[1], n, m, tile, even))
    return weight.new_empty(total), weight.new_empty(total + 1, dtype=torch.int16)
