"""Magnitude: keep the largest weights of each group. It needs no data, and is what every other solver has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.nm.masks import apply_mask
from openwork.pruning.solver import Groups, Solver


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the N largest |w| of each group."""

    needs_gram: ClassVar[bool] = False

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        return apply_mask(weight, groups.mask(weight.abs()))
