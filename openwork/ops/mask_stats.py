"""Topology of many masks at once as operators: on a GPU one launch each, instead of one for every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwork.nm import mask_stats
from openwork.ops.masks import ON_LISTS, library

library.define("pack_list(Tensor[] masks) -> Tensor[]", tags=ON_LISTS)
library.define("packed_sad_list(Tensor[] a, Tensor[] b) -> Tensor", tags=ON_LISTS)


def pack_list(masks: Sequence[Tensor]) -> list[Tensor]:
    """`openwork.nm.mask_stats.pack` of masks on one device.

    >>> pack_list([torch.tensor([True, False]), torch.tensor([False, True])])
    [tensor([1], dtype=torch.uint8), tensor([2], dtype=torch.uint8)]
    """
    return torch.ops.openwork.pack_list.default(list(masks)) if masks else []


def packed_sad_list(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[int]:
    """`openwork.nm.mask_stats.packed_sad` of pairs of packed masks on one device. Unit: weights.

    >>> packed_sad_list(pack_list([torch.tensor([True, False])]), pack_list([torch.tensor([False, True])]))
    [2]
    """
    wrong = [(x.numel(), y.numel()) for x, y in zip(a, b, strict=True) if x.shape != y.shape]
    if wrong:
        raise ValueError(f"packed masks of {wrong[0][0]} and {wrong[0][1]} bytes: they must be equal")
    return torch.ops.openwork.packed_sad_list.default(list(a), list(b)).tolist() if a else []


@torch.library.impl(library, "pack_list", "CompositeExplicitAutograd")
def _pack_list(masks: list[Tensor]) -> list[Tensor]:
    return [mask_stats.pack(mask) for mask in masks]


@torch.library.impl(library, "packed_sad_list", "CompositeExplicitAutograd")
def _packed_sad_list(a: list[Tensor], b: list[Tensor]) -> Tensor:
    counts = [mask_stats.packed_sad(x, y) for x, y in zip(a, b, strict=True)]
    return torch.tensor(counts, dtype=torch.int64, device=a[0].device)


@torch.library.register_fake("openwork::pack_list")
def _(masks: list[Tensor]) -> list[Tensor]:
    return [mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8) for mask in masks]


@torch.library.register_fake("openwork::packed_sad_list")
def _(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0].new_empty(len(a), dtype=torch.int64)
