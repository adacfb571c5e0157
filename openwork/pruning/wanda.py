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
    """Keep the N largest |w| times norm of the input of each group; the kept weights stay as they are. Source: Sun et
    al., ICLR 2024, arXiv:2306.11695.

    >>> import torch, openwork as ow
    >>> model, batch = torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.randn(64, 16)
    >>> 0 < ow.prune(model, "2:4", [batch], solver=ow.Wanda()).error < 1
    True
    """

    needs_gram: ClassVar[bool] = False

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        return apply_mask(weight, groups.mask(weight.abs() * diagonal(gram).sqrt().to(weight.dtype)))
