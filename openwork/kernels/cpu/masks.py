"""The mask operators on a CPU with the native library: one pass over the weight where it lies.

Those for CUDA tensors are in `openwork.kernels.cuda.triton`; here stands what leads to them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cpu.groups import groups_in_memory, same_strides
from openwork.kernels.cpu.native import DTYPES, Groups, library
from openwork.kernels.cuda import triton
from openwork.kernels.cuda.stream import capturing
from openwork.ops.mask_stats import _pack_list, _packed_sad_list
from openwork.ops.masks import (
    _add_decayed,
    _add_decayed_list,
    _keep_largest,
    _keep_largest_list,
    _prune,
    _prune_list,
    check_alike,
    for_operator,
    parsed,
)
from openwork.ops.skinny import thin_linear as _thin_linear
from openwork.ops.transposable import _keep_transposable

_HERE = (torch.float32, torch.bfloat16, torch.float16)


def _loaded(device: str) -> bool:
    return library() is not None if device == "cpu" else triton.available()


# What torch.compiler.assume_constant_result sets. It would import the compiler here, which takes seconds.
_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_one_pass(weight: Tensor) -> bool:
    """Whether `openwork.ops.prune` and `add_decayed` read this weight once, instead of making a mask first."""
    return for_operator(weight) and weight.dtype in _HERE and _loaded(weight.device.type)


def takes_lists(weight: Tensor) -> bool:
    """Whether the operators on lists are one launch for weights like this one, instead of one for each. Not where a
    CUDA graph is captured, or compiled code may become one: a list is a table of addresses, which the graph would have
    to hold, and launches in a graph cost next to nothing."""
    return weight.is_cuda and not torch.compiler.is_compiling() and not capturing(weight)


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
    if groups is None or out.shape != weight.shape or not same_strides(out, weight) or out.dtype != weight.dtype:
        return False
    lib.openwork_prune(ctypes.byref(groups), DTYPES[weight.dtype], weight.data_ptr(), out.data_ptr())
    return True


def add_decayed(gradient: Tensor, weight: Tensor, rate: float, *where: Any) -> None:
    check_alike(gradient, weight)
    lib, groups = _native(weight, *where)
    alike = same_strides(gradient, weight) and gradient.dtype == weight.dtype != torch.float16
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
    """Register them for the CPU and for CUDA on the library that `openwork.ops` opened."""
    faster: dict[str, Callable[..., Any]] = {"keep_largest": keep_largest, "prune": prune, "add_decayed": add_decayed}
    for name, function in faster.items():
        operators.impl(name, function, "CPU")
    for name in ON_CUDA:
        operators.impl(name, functools.partial(_on_cuda, name), "CUDA")


ON_CUDA: dict[str, tuple[str, Callable[..., Any]]] = {
    "keep_largest": ("masks", _keep_largest),
    "prune": ("masks", _prune),
    "add_decayed": ("masks", _add_decayed),
    "keep_largest_list": ("masks", _keep_largest_list),
    "prune_list": ("masks", _prune_list),
    "add_decayed_list": ("masks", _add_decayed_list),
    "pack_list": ("bits", _pack_list),
    "packed_sad_list": ("bits", _packed_sad_list),
    "thin_linear": ("thin", _thin_linear),
    "keep_transposable": ("transposable", _keep_transposable),
}


def _on_cuda(name: str, *arguments: Any) -> Any:
    """The Triton kernel of this name, imported now, or the reference where there is no Triton."""
    file, plain = ON_CUDA[name]
    if not triton.available():
        return plain(*arguments)
    return getattr(importlib.import_module(f"openwork.kernels.cuda.triton.{file}"), name)(*arguments)
