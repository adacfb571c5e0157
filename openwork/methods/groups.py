"""What methods compute of the groups of a weight.

K = weights along the reduction axis, M = group size, G = groups
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from openwork.methods.schedule import Phase
from openwork.nm.groups import Axis, from_rows, reduction_size, to_rows


def in_groups(values: Tensor, axis: Axis, m: int) -> Tensor:
    """(..., K) as (..., G, M), the reduction axis last; zeros fill a short group up."""
    rows = to_rows(values, axis)
    return pad(rows, (0, -rows.shape[-1] % m)).unflatten(-1, (-1, m))


def of_groups(numbers: Tensor, axis: Axis, m: int, shape: tuple[int, ...]) -> Tensor:
    """One number for each group, (..., G), at each of its weights: `shape`."""
    return from_rows(numbers.repeat_interleave(m, -1)[..., : reduction_size(shape, axis)], axis, shape)


def dense_groups(score: Tensor, phase: Phase) -> Tensor:
    """Which weights lie in the groups that `phase.dense_groups` leaves dense: of all groups of the weight so large a
    share, rounded down, those with the smallest sums. Equal sums: the first, in the order of the rows."""
    m = phase.pattern.m
    precise = None if score.dtype == torch.float64 else torch.float32
    sums = in_groups(score, phase.axis, m).sum(-1, dtype=precise)
    order = sums.flatten().argsort(stable=True)
    count = (torch.as_tensor(phase.dense_groups, dtype=torch.float64) * len(order)).floor()
    first = torch.arange(len(order), device=order.device) < count
    stays = torch.zeros_like(first).scatter(0, order, first).view_as(sums)
    return of_groups(stays, phase.axis, m, tuple(score.shape))
