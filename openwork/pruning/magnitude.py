"""Magnitude: keep the largest weights of each group. It needs no data, and is what every other solver has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.nm.masks import apply_mask
from openwork.pruning.solver import Groups, Solver


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the N largest |w| of each group: no data, no compensation; what every other solver has to beat.

    >>> import torch, openwork as ow
    >>> model, batch = torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.randn(64, 16)
    >>> 0 < ow.prune(model, "2:4", [batch], solver=ow.Magnitude()).error < 1
    True
    """

    needs_gram: ClassVar[bool] = False

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        return apply_mask(weight, groups.mask(weight.abs()))
