"""Topology metrics: how much a mask moves. Pure functions on masks (boolean, True means kept).

SAD is the sparse architecture divergence of Zhou et al., ICLR 2021 (arXiv:2102.04010): the L1 distance of
two masks. Masks are stored at one bit a weight by `pack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.nm.pattern import Pattern


def sad(a: Tensor, b: Tensor) -> int:
    """Sparse architecture divergence ||a - b||_1 of two masks, bool of one shape: positions whose membership differs.
    Unit: weights. Source: Zhou et al., ICLR 2021, arXiv:2102.04010.

    Masks with equally many kept weights differ in pairs (one leaves, one enters), so SAD is even.

    >>> sad(torch.tensor([True, False]), torch.tensor([False, True]))
    2
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of shapes {tuple(a.shape)} and {tuple(b.shape)}: they must be equal")
    if a.dtype != torch.bool or b.dtype != torch.bool:
        raise TypeError(f"masks of {a.dtype} and {b.dtype}; needed torch.bool (`packed_sad` takes packed ones)")
    return int((a ^ b).sum())


def flip_rate(a: Tensor, b: Tensor) -> float:
    """`sad` as a share of all weights, in [0, 1]: the flip rate when `a` and `b` are a step apart.

    >>> flip_rate(torch.tensor([True, False, False, True]), torch.tensor([True, False, True, False]))
    0.5
    """
    return sad(a, b) / a.numel()


def largest_flip_rate(pattern: Pattern) -> float:
    """The most that `flip_rate` can be: every kept weight replaced, as far as there are others.

    >>> largest_flip_rate(Pattern(2, 4)), largest_flip_rate(Pattern(1, 16))
    (1.0, 0.125)
    """
    return 2 * min(pattern.n, pattern.m - pattern.n) / pattern.m


def chance_flip_rate(pattern: Pattern) -> float:
    """What `flip_rate` is on average between two unrelated masks.

    >>> chance_flip_rate(Pattern(2, 4)), chance_flip_rate(Pattern(1, 4))
    (0.5, 0.375)
    """
    return 2 * pattern.density * (1 - pattern.density)


def pack(mask: Tensor) -> Tensor:
    """A mask at one bit a weight: bool, any shape -> uint8 (ceil(weights / 8),), low bit first.

    >>> pack(torch.tensor([True, False, False, True, True]))
    tensor([25], dtype=torch.uint8)
    """
    eights = _eights(mask.reshape(-1).view(torch.uint8) if mask.dtype == torch.bool else mask.reshape(-1).byte())
    return ((eights * 0x0102040810204080) >> 56).to(torch.uint8)  # eight bytes of 0 and 1: bit i of the last is byte i


def packed_sad(a: Tensor, b: Tensor) -> int:
    """`sad` of two masks packed by `pack`: uint8 (B,) each -> weights.

    >>> packed_sad(pack(torch.tensor([True, False])), pack(torch.tensor([False, True])))
    2
    """
    if a.shape != b.shape:
        raise ValueError(f"packed masks of {a.numel()} and {b.numel()} bytes: they must be equal")
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise TypeError(f"packed masks of {a.dtype} and {b.dtype}; needed torch.uint8, as `pack` makes them")
    x = _eights(a ^ b)  # ones are counted in pairs of bits, in fours, in bytes
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return int(((x * 0x0101010101010101) >> 56).sum())


def _eights(data: Tensor) -> Tensor:
    """Bytes as int64, eight in each, zeros after the last."""
    rest = -data.numel() % 8
    padded = torch.nn.functional.pad(data, (0, rest)) if rest else data
    return (padded if padded.storage_offset() % 8 == 0 else padded.clone()).view(torch.int64)
