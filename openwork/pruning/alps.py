"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): mask and weights together, by the alternating direction method of
multipliers, with a penalty that grows until the mask stands still; then the refit.

    A = the damped Gram matrix, scaled to a diagonal of ones; B0 = W0 scaled alike; A = Q diag(L) Q'
    repeat   B = (B0 A - V + rho D) (A + rho I)^-1        least squares, pulled towards D
             D = keep N of M of (B + V / rho)
             V = V + rho (B - D)
    and every third time rho grows by 1.3, 1.2 or 1.1, the less of the mask changed the less; where nothing did, it ends
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.nm.masks import apply_mask
from openwork.pruning.refit import refit
from openwork.pruning.solver import Groups, Solver, damped

_EVERY = 3  # steps between two looks at the mask


@dataclass(frozen=True)
class ALPS(Solver):
    """Find mask and weights together. The smallest error of all solvers, ten times the time of `SparseGPT`. `steps`: at
    most so many; `damp`: as there; `rho`: the penalty at the start, the Gram matrix's diagonal being one. Source: Meng
    et al., NeurIPS 2024, arXiv:2406.07831.

    >>> import torch, openwork as ow
    >>> model, batch = torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.randn(64, 16)
    >>> 0 < ow.prune(model, "2:4", [batch], solver=ow.ALPS()).error < 1
    True
    """

    steps: int = 300
    damp: float = 0.01
    rho: float = 0.1

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        A = damped(gram, self.damp)
        scale = A.diagonal().sqrt()
        L, Q = (each.to(weight.dtype) for each in torch.linalg.eigh((A / scale / scale[:, None]).double()))
        scale = scale.to(weight.dtype)
        found = self._alternate(weight * scale, L.clamp(min=0), Q, groups) / scale
        return refit(found, weight, A, steps=10)

    def _alternate(self, B0: Tensor, L: Tensor, Q: Tensor, groups: Groups) -> Tensor:
        def keep(score: Tensor) -> Tensor:
            return apply_mask(score, groups.mask(score.abs()))

        rho, D, V = self.rho, keep(B0), torch.zeros_like(B0)
        Y = (B0 @ Q * L) @ Q.T
        first = last = D != 0
        for step in range(1, self.steps + 1):
            B = ((Y - V + rho * D) @ Q / (L + rho)) @ Q.T
            D = keep(B + V / rho)
            V += rho * (B - D)
            if step % _EVERY == 0:
                changed, last = float((last != (D != 0)).sum() / last.sum()), D != 0
                if changed:
                    rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
                elif step > 30 or bool((last != first).any()):
                    break
                else:
                    rho /= 5  # so large from the start that the mask cannot move
        return keep(B)
