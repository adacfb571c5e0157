"""Topology of many masks at once as operators: on a GPU one launch each, instead of one for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwork.nm import mask_stats
from openwork.ops.library import NO_GRAPH, library, reference

library.define("foreach_pack(Tensor[] masks) -> Tensor[]", tags=NO_GRAPH)
library.define("foreach_packed_sad(Tensor[] a, Tensor[] b) -> Tensor", tags=NO_GRAPH)


def foreach_pack(masks: Sequence[Tensor]) -> list[Tensor]:
    """`openwork.nm.mask_stats.pack` of masks on one device.

    >>> foreach_pack([torch.tensor([True, False]), torch.tensor([False, True])])
    [tensor([1], dtype=torch.uint8), tensor([2], dtype=torch.uint8)]
    """
    return torch.ops.openwork.foreach_pack.default(list(masks)) if masks else []


def foreach_packed_sad(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[int]:
    """`openwork.nm.mask_stats.packed_sad` of pairs of packed masks on one device. Unit: weights.

    >>> foreach_packed_sad(foreach_pack([torch.tensor([True, False])]), foreach_pack([torch.tensor([False, True])]))
    [2]
    """
    wrong = [(x.numel(), y.numel()) for x, y in zip(a, b, strict=True) if x.shape != y.shape]
    if wrong:
        raise ValueError(f"packed masks of {wrong[0][0]} and {wrong[0][1]} bytes: they must be equal")
    return torch.ops.openwork.foreach_packed_sad.default(list(a), list(b)).tolist() if a else []


@reference("foreach_pack")
def pack_reference(masks: list[Tensor]) -> list[Tensor]:
    return [mask_stats.pack(mask) for mask in masks]


@reference("foreach_packed_sad")
def packed_sad_reference(a: list[Tensor], b: list[Tensor]) -> Tensor:
    counts = [mask_stats.packed_sad(x, y) for x, y in zip(a, b, strict=True)]
    return torch.tensor(counts, dtype=torch.int64, device=a[0].device)


@torch.library.register_fake("openwork::foreach_pack")
def _(masks: list[Tensor]) -> list[Tensor]:
    return [mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8) for mask in masks]


@torch.library.register_fake("openwork::foreach_packed_sad")
def _(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0].new_empty(len(a), dtype=torch.int64)
