"""How far the outputs of two models are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference over the largest magnitude, of the worst pair; infinite where shapes differ, or what is
    not finite.

    >>> largest_difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
    0.25
    """
    if [each.shape for each in expected] != [each.shape for each in found]:
        return math.inf
    return max((_relative(a, b) for a, b in zip(expected, found, strict=True) if a.numel()), default=0.0)


def _relative(expected: Tensor, found: Tensor) -> float:
    a, b = expected.detach().double(), found.detach().to(expected.device).double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    apart = torch.where(same, 0.0, (a - b).abs()).max()  # NaN where one is
    largest = torch.where(a.isfinite(), a.abs(), 0.0).max()
    return math.inf if apart.isnan() else float(apart / largest)
