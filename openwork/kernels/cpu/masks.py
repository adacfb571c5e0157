"""The mask operators on a CPU with the native library: one pass over each weight where it lies.

A weight that the library cannot take (float64, views with gaps) is left to the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cpu import native
from openwork.kernels.cpu.groups import groups_in_memory, same_strides
from openwork.kernels.cpu.native import DTYPES, Isa, address, done
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.library import parsed
from openwork.ops.masks import add_decay, check_decay

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
    check_decay(gradients, weights, rate)
    pattern, places = parsed(weights, n, m, axes)
    for gradient, weight, axis in zip(gradients, weights, places, strict=True):
        _decay(gradient, weight, rate, pattern, axis)


def prune_into(out: Tensor, weight: Tensor, pattern: Pattern, axis: Axis) -> bool:
    """Write the pruned weight to `out`, which has its strides, where a kernel can; says whether it did."""
    call = _native(weight, pattern, axis)
    fits = out.shape == weight.shape and same_strides(out, weight) and out.dtype == weight.dtype
    if call is None or not fits:
        return False
    isa, groups = call
    done(isa.lib.openwork_prune(isa.kernels, groups, DTYPES[weight.dtype], address(weight), address(out)))
    return True


def decay_into(out: Tensor, gradient: Tensor, weight: Tensor, rate: float, pattern: Pattern, axis: Axis) -> bool:
    """Write gradient + rate * weight where pruned to `out`, which has the gradient's strides and may be it, where a
    kernel can; says whether it did."""
    call = _native(weight, pattern, axis)
    alike = same_strides(gradient, weight) and same_strides(out, weight)
    same = gradient.dtype == out.dtype == weight.dtype != torch.float16
    if call is None or not alike or not same:
        return False
    isa, groups = call
    places = (address(weight), address(gradient), address(out))
    done(isa.lib.openwork_decay(isa.kernels, groups, DTYPES[weight.dtype], *places, rate))
    return True


def _mask(score: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    call = _native(score, pattern, axis)
    if call is None:
        return magnitude_mask(score, pattern, axis)
    isa, groups = call
    mask = torch.empty_like(score, dtype=torch.bool)
    done(isa.lib.openwork_keep(isa.kernels, groups, DTYPES[score.dtype], address(score), address(mask)))
    return mask


def _pruned(weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    out = torch.empty_like(weight)
    if prune_into(out, weight, pattern, axis):
        return out
    return apply_mask(weight, magnitude_mask(weight.abs(), pattern, axis))


def _decay(gradient: Tensor, weight: Tensor, rate: float, pattern: Pattern, axis: Axis) -> None:
    if not decay_into(gradient, gradient, weight, rate, pattern, axis):
        add_decay(gradient, weight, rate, magnitude_mask(weight.abs(), pattern, axis))


def _native(weight: Tensor, pattern: Pattern, axis: Axis) -> tuple[Isa, Any] | None:
    """The kernels and where groups lie, for a weight that the library can take."""
    isa = native.isa()
    if isa is None or weight.dtype not in TAKEN or weight.numel() == 0:
        return None
    groups = groups_in_memory(weight, pattern.n, pattern.m, axis)
    return None if groups is None else (isa, ctypes.byref(groups))
