"""The mask operators on a CPU with the native library: one pass over each weight where it lies.

A weight that the library cannot take (float64, views with gaps) is left to the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cpu.groups import groups_in_memory, same_strides
from openwork.kernels.cpu.native import DTYPES, Groups, library
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.library import parsed
from openwork.ops.masks import add_decay, check_alike

TAKEN = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the kernels, here and on a GPU."""


def foreach_mask(scores: Sequence[Tensor], n: int, m: int, axes: Sequence[int]) -> list[Tensor]:
    pattern, places = parsed(scores, n, m, axes)
    return [_mask(score, pattern, axis) for score, axis in zip(scores, places, strict=True)]


def foreach_prune(weights: Sequence[Tensor], n: int, m: int, axes: Sequence[int]) -> list[Tensor]:
    pattern, places = parsed(weights, n, m, axes)
    return [_pruned(weight, pattern, axis) for weight, axis in zip(weights, places, strict=True)]


def foreach_decay(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], rate: float, n: int, m: int, axes: Sequence[int]
) -> None:
    check_alike(gradients, weights)
    pattern, places = parsed(weights, n, m, axes)
    for gradient, weight, axis in zip(gradients, weights, places, strict=True):
        _decay(gradient, weight, rate, pattern, axis)


def prune_into(out: Tensor, weight: Tensor, pattern: Pattern, axis: Axis) -> bool:
    """Write the pruned weight to `out`, which has its strides, where a kernel can; says whether it did."""
    lib, groups = _native(weight, pattern, axis)
    if groups is None or out.shape != weight.shape or not same_strides(out, weight) or out.dtype != weight.dtype:
        return False
    lib.openwork_prune(ctypes.byref(groups), DTYPES[weight.dtype], weight.data_ptr(), out.data_ptr())
    return True


def decay_into(out: Tensor, gradient: Tensor, weight: Tensor, rate: float, pattern: Pattern, axis: Axis) -> bool:
    """Write gradient + rate * weight where pruned to `out`, which has the gradient's strides and may be it, where a
    kernel can; says whether it did."""
    lib, groups = _native(weight, pattern, axis)
    alike = same_strides(gradient, weight) and same_strides(out, weight)
    same = gradient.dtype == out.dtype == weight.dtype != torch.float16
    if groups is None or not alike or not same:
        return False
    places = (weight.data_ptr(), gradient.data_ptr(), out.data_ptr())
    lib.openwork_decay(ctypes.byref(groups), DTYPES[weight.dtype], *places, rate)
    return True


def _mask(score: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    lib, groups = _native(score, pattern, axis)
    if groups is None:
        return magnitude_mask(score, pattern, axis)
    mask = torch.empty_like(score, dtype=torch.bool)
    lib.openwork_keep(ctypes.byref(groups), DTYPES[score.dtype], score.data_ptr(), mask.data_ptr())
    return mask


def _pruned(weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    out = torch.empty_like(weight)
    if prune_into(out, weight, pattern, axis):
        return out
    return apply_mask(weight, magnitude_mask(weight.abs(), pattern, axis))


def _decay(gradient: Tensor, weight: Tensor, rate: float, pattern: Pattern, axis: Axis) -> None:
    if not decay_into(gradient, gradient, weight, rate, pattern, axis):
        add_decay(gradient, weight, rate, magnitude_mask(weight.abs(), pattern, axis))


def _native(weight: Tensor, pattern: Pattern, axis: Axis) -> tuple[Any, Groups | None]:
    lib = library()
    fits = lib is not None and weight.dtype in TAKEN and weight.numel() > 0
    return lib, groups_in_memory(weight, pattern.n, pattern.m, axis) if fits else None
