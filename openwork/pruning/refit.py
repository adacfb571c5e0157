"""The best weights for a given mask: masked least squares.

    minimize tr((W - W0) A (W - W0)')  over W that is zero where the mask is;  A = the damped Gram matrix

Each row is a problem of its own, (A_SS) w_S = (A w0)_S on its kept columns S. All are solved at once by conjugate
gradients whose residuals are cut to the mask, on columns scaled to a diagonal of ones (as at the end of ALPS,
arXiv 2406.07831).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from openwork.nm.masks import apply_mask
from openwork.pruning.solver import Groups, Solver, damped
from openwork.pruning.wanda import Wanda


@dataclass(frozen=True)
class Refit(Solver):
    """Another solver's mask with the weights that are best for it. `steps`: at most so many of conjugate gradients.

    >>> import torch, openwork as ow
    >>> model, batch = torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.randn(64, 16)
    >>> 0 < ow.prune(model, "2:4", [batch], solver=ow.Refit(ow.Magnitude())).error < 1
    True
    """

    mask_from: Solver = field(default_factory=Wanda)
    damp: float = 0.01
    steps: int = 50

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        return refit(self.mask_from.solve(weight, gram, groups), weight, damped(gram, self.damp), self.steps)


@dataclass(frozen=True)
class GivenMask(Solver):
    """A mask (R, K) that is known; the kept weights stay as they are."""

    mask: Tensor

    needs_gram: ClassVar[bool] = False

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        return apply_mask(weight, self.mask)


def refit(pruned: Tensor, dense: Tensor, A: Tensor, steps: int, tolerance: float = 1e-4) -> Tensor:
    """The weights for the mask of `pruned` (R, K), where conjugate gradients begin, that are nearest to `dense` (R, K)
    in the norm of A (K, K). They end after `steps`, or when the residual is `tolerance` of the first."""
    scale = A.diagonal().sqrt()
    scaled = (A / scale / scale[:, None]).to(dense.dtype)
    scale = scale.to(dense.dtype)
    kept = pruned != 0
    weight = pruned * scale
    residual = ((dense * scale - weight) @ scaled).where(kept, 0)
    direction, squares = residual, residual.square().sum(1, keepdim=True)
    enough = tolerance**2 * float(squares.sum())
    for _ in range(steps):
        if float(squares.sum()) <= enough:
            break
        ahead = (direction @ scaled).where(kept, 0)
        length = _ratio(squares, (direction * ahead).sum(1, keepdim=True))
        weight, residual = weight + length * direction, residual - length * ahead
        former, squares = squares, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(squares, former) * direction
    return weight / scale


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where a row is solved already."""
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), 0)
