"""The mask operators on a CPU with the native library: one pass over the weight where it lies."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openwork.axis import Axis
from openwork.kernels.native import DTYPES, Groups, library
from openwork.ops.masks import _add_decayed, _keep_largest, _prune, demand_alike, for_operator, parsed

_HERE = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def _loaded() -> bool:
    return library() is not None


def in_one_pass(weight: Tensor) -> bool:
    """Whether `openwork.ops.prune` and `add_decayed` read this weight once, instead of making a mask first."""
    return _loaded() and for_operator(weight) and weight.dtype in _HERE


def groups_in_memory(weight: Tensor, n: int, m: int, axis: Axis) -> Groups | None:
    """How the groups of a weight lie in its memory, whatever the order of its dims there; None where they do not lie in
    three nested loops: views with gaps or overlaps, flat groups of a weight that is not contiguous."""
    if axis.flat:
        return Groups(1, weight.numel(), 1, n, m) if weight.is_contiguous() else None
    order = sorted(range(weight.ndim), key=lambda dim: (weight.stride(dim), weight.shape[dim] != 1), reverse=True)
    sizes = [weight.shape[dim] for dim in order]
    if any(weight.stride(d) != math.prod(sizes[i + 1 :]) for i, d in enumerate(order) if weight.shape[d] != 1):
        return None
    at = order.index(axis.dim)
    length = sizes[at] // axis.blocks
    return Groups(math.prod(sizes[:at]) * axis.blocks, length, math.prod(sizes[at + 1 :]), n, m)


def keep_largest(score: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> Tensor:
    lib, groups = _native(score, n, m, dim, blocks, flat)
    if groups is None:
        return _keep_largest(score, n, m, dim, blocks, flat)
    mask = torch.empty_like(score, dtype=torch.bool)
    lib.openwork_keep(ctypes.byref(groups), DTYPES[score.dtype], score.data_ptr(), mask.data_ptr())
    return mask


def prune(weight: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> Tensor:
    out = torch.empty_like(weight)
    return out if prune_into(out, weight, n, m, dim, blocks, flat) else _prune(weight, n, m, dim, blocks, flat)


def prune_into(out: Tensor, weight: Tensor, *where: Any) -> bool:
    """Write the pruned weight to `out`, which has its strides, where a kernel can; says whether it did."""
    lib, groups = _native(weight, *where)
    if groups is None or out.stride() != weight.stride() or out.shape != weight.shape or out.dtype != weight.dtype:
        return False
    lib.openwork_prune(ctypes.byref(groups), DTYPES[weight.dtype], weight.data_ptr(), out.data_ptr())
    return True


def add_decayed(gradient: Tensor, weight: Tensor, rate: float, *where: Any) -> None:
    demand_alike(gradient, weight)
    lib, groups = _native(weight, *where)
    alike = gradient.stride() == weight.stride() and gradient.dtype == weight.dtype != torch.float16
    if groups is None or not alike:
        return _add_decayed(gradient, weight, rate, *where)
    lib.openwork_decay(ctypes.byref(groups), DTYPES[weight.dtype], weight.data_ptr(), gradient.data_ptr(), rate)
    return None


def _native(weight: Tensor, *where: Any) -> tuple[Any, Groups | None]:
    pattern, axis = parsed(weight, *where)
    lib = library()
    fits = lib is not None and weight.dtype in _HERE and weight.numel() > 0
    return lib, groups_in_memory(weight, pattern.n, pattern.m, axis) if fits else None


def register(operators: Any) -> None:
    """Register them for the CPU on the library that `openwork.ops` opened."""
    faster: dict[str, Callable[..., Any]] = {"keep_largest": keep_largest, "prune": prune, "add_decayed": add_decayed}
    for name, function in faster.items():
        operators.impl(name, function, "CPU")
