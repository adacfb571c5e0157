"""Where the groups of a weight lie in memory, for kernels that read the weight where it is."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from openwork.kernels.cpu.native import Groups
from openwork.nm.groups import Axis


def groups_in_memory(weight: Tensor, n: int, m: int, axis: Axis) -> Groups | None:
    """How the groups of a weight lie in its memory, whatever the order of its dims there; None where they do not lie in
    three nested loops: views with gaps or overlaps, flat groups of a weight that is not contiguous."""
    if axis.flat:
        return Groups(1, weight.numel(), 1, n, m) if weight.is_contiguous() else None
    return _nested(tuple(weight.shape), weight.stride(), n, m, axis)


@functools.lru_cache(maxsize=1024)  # a weight is asked for in every step, and nobody writes to what is returned
def _nested(shape: tuple[int, ...], strides: tuple[int, ...], n: int, m: int, axis: Axis) -> Groups | None:
    order = sorted(range(len(shape)), key=lambda dim: (strides[dim], shape[dim] != 1), reverse=True)
    sizes = [shape[dim] for dim in order]
    if any(strides[d] != math.prod(sizes[i + 1 :]) for i, d in enumerate(order) if shape[d] != 1):
        return None
    at = order.index(axis.dim)
    length = sizes[at] // axis.blocks
    return Groups(math.prod(sizes[:at]) * axis.blocks, length, math.prod(sizes[at + 1 :]), n, m)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether weights of one shape lie alike in memory; the stride of a dim of size 1 says nothing."""
    if a.stride() == b.stride():
        return True
    return all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))
