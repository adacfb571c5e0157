"""The weights of files (docs/format.md) packed and unpacked by the native library: one pass over each.

Everything here says None where the library is missing; `openwork.files.packing` has the definition, and runs then.
"""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from openwork.kernels.cpu import native
from openwork.kernels.cpu.masks import TAKEN
from openwork.kernels.cpu.native import DTYPES, Compressed, address, done
from openwork.nm.pattern import Pattern

_AS_IT_IS = -1


def compress(rows: Tensor, values: Tensor, indices: Tensor, pattern: Pattern, *, prune: bool = False) -> int | None:
    """Fill values and indices, of the sizes of the format, from contiguous rows (..., K) of numbers whose zero is
    nothing but zero bits. Returns how many groups hold too many: then what was filled in means nothing.
    `prune`: of each group of a denser weight the N largest magnitudes, as `openwork.ops.foreach_prune` leaves them."""
    isa = native.isa()
    if isa is None or (prune and rows.dtype not in TAKEN):
        return None
    crowded = ctypes.c_int64()
    call = _call(rows, tuple(rows.shape), values, indices, pattern)
    call.pruned_as = DTYPES[rows.dtype] if prune else _AS_IT_IS
    done(isa.lib.openwork_compress(isa.kernels, ctypes.byref(call), ctypes.byref(crowded)))
    return crowded.value


def expand(
    rows: Tensor | None,
    shape: tuple[int, ...],
    values: Tensor,
    indices: Tensor,
    pattern: Pattern,
    span: tuple[int, int] | None = None,
) -> bool | None:
    """Fill rows of `shape`, contiguous, from values and indices of the sizes of the format, or only look at these.
    Returns whether they keep every rule of it: else the rows mean nothing. `span`: of some groups alone, in the order
    of the values, from a multiple of 8 on."""
    isa = native.isa()
    if isa is None:
        return None
    sound = ctypes.c_int32()
    call = _call(rows, shape, values, indices, pattern)
    span = span or (0, values.numel() // pattern.n)
    done(isa.lib.openwork_expand(isa.kernels, ctypes.byref(call), *span, ctypes.byref(sound)))
    return bool(sound.value)


def _call(rows: Tensor | None, shape: tuple[int, ...], values: Tensor, indices: Tensor, pattern: Pattern) -> Compressed:
    count, K = math.prod(shape[:-1]), shape[-1]
    if K % pattern.m == 0:
        count, K = 1, count * K  # groups lie end to end: one long row
    places = (address(rows), address(values), address(indices))
    return Compressed(*places, count, K, pattern.n, pattern.m, values.itemsize, _AS_IT_IS)
