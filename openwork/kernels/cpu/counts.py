"""What is told of a weight, in one pass by the native library where it can: whether it is N:M, what a mask keeps of it.

Everything here has its definition in `openwork.nm.masks`, which runs for all other weights.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from openwork.kernels.cpu import native
from openwork.kernels.cpu.groups import groups_in_memory
from openwork.kernels.cpu.native import DTYPES, Groups, Isa, address, done
from openwork.nm import masks
from openwork.nm.groups import Axis
from openwork.nm.masks import GroupCounts
from openwork.nm.pattern import Pattern

_PART = 2**17  # weights: sums of parts are added in their order, so that they are the same on any number of threads
_ALL = 2**64 - 1
_MAGNITUDE = {2: 0x7FFF, 4: 0x7FFF_FFFF, 8: 0x7FFF_FFFF_FFFF_FFFF}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def group_counts(weight: Tensor, pattern: Pattern, axis: Axis) -> GroupCounts:
    """`openwork.nm.masks.group_counts`: how many weights are not zero, in groups, and in how many of these too many.

    >>> group_counts(torch.tensor([[1.0, 0.0, 2.0, 0.0, 5.0, 6.0]]), Pattern(1, 4), Axis(1))
    GroupCounts(nonzero=4, groups=2, crowded=2, most=2)
    """
    call = _native(weight, pattern, axis, (*_FLOATS, *_WHOLE))
    if call is None:
        return masks.group_counts(weight, pattern, axis)
    isa, groups = call
    counted = _MAGNITUDE[weight.itemsize] if weight.dtype in _FLOATS else _ALL
    parts = max(1, weight.numel() // _PART)
    counts = np.empty((parts, 3), np.int64)
    place = (weight.itemsize, counted, address(weight), parts, counts.ctypes.data)
    done(isa.lib.openwork_count_groups(isa.kernels, ctypes.byref(groups), *place))
    in_all = groups.outer * groups.inner * -(-groups.length // groups.m)
    return GroupCounts(int(counts[:, 0].sum()), in_all, int(counts[:, 1].sum()), int(counts[:, 2].max()))


def too_dense(weight: Tensor, pattern: Pattern, axis: Axis) -> str:
    """`openwork.nm.masks.too_dense`: why a weight is not N:M along an axis; empty where it is.

    >>> too_dense(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), Pattern(2, 4), Axis(1))
    '1 of 1 group holds more than 2 of 4 (the worst 3)'
    """
    return group_counts(weight, pattern, axis).too_dense(pattern)


def retained_share(weight: Tensor, pattern: Pattern, axis: Axis) -> float:
    """The share of the sum of squared weights that `magnitude_mask` keeps.

    >>> retained_share(torch.tensor([[1.0, 2.0, 2.0, 4.0]]), Pattern(1, 4), Axis(1))
    0.64
    """
    call = _native(weight, pattern, axis, (torch.float32, torch.bfloat16))
    if call is None:
        return masks.retained_share(weight, masks.magnitude_mask(weight.abs(), pattern, axis))
    isa, groups = call
    parts = max(1, weight.numel() // _PART)
    sums = np.empty((parts, 2), np.float64)
    place = (DTYPES[weight.dtype], address(weight), parts, sums.ctypes.data)
    done(isa.lib.openwork_retained(isa.kernels, ctypes.byref(groups), *place))
    kept, everything = sums.sum(0).tolist()
    return kept / everything if everything else 1.0


def _native(weight: Tensor, pattern: Pattern, axis: Axis, dtypes: tuple[torch.dtype, ...]) -> tuple[Isa, Groups] | None:
    """The kernels and where groups lie, for a weight that the library can take."""
    isa, plain = native.isa(), type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    if isa is None or not plain or weight.layout != torch.strided or weight.dtype not in dtypes or not weight.numel():
        return None
    axis = Axis(axis.dim % weight.ndim, axis.blocks, axis.flat) if weight.ndim else axis
    fits = axis.flat or (weight.ndim > 0 and axis.blocks >= 1 and weight.shape[axis.dim] % axis.blocks == 0)
    groups = groups_in_memory(weight, pattern.n, pattern.m, axis) if fits else None
    return None if groups is None else (isa, groups)
