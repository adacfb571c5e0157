"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): a weight counts by what it adds to the output.

score_ij = |W_ij| * ||X_j||        the norm of input j over all calibration samples
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.nm.masks import apply_mask
from openwork.pruning.solver import Groups, Solver, diagonal


@dataclass(frozen=True)
class Wanda(Solver):
    """Keep the N largest |w| times norm of the input of each group; the kept weights stay as they are."""

    needs_gram: ClassVar[bool] = False

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        return apply_mask(weight, groups.mask(weight.abs() * diagonal(gram).sqrt().to(weight.dtype)))
