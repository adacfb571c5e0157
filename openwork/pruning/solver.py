"""What a one-shot solver is, and the layer problem that it solves.

    R = rows (outputs), K = columns (inputs of one output), S = samples, rows of the layer's input X (S, K)

With the Gram matrix H = X' X (K, K), the squared error of the output is tr((W - W0) H (W - W0)'): its rows are
independent problems, and the samples themselves are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.nm.transposable import transposable_mask


@dataclass(frozen=True)
class Groups:
    """Where the groups of a row lie: `pattern` along every run of `width` columns (the channels of one tap of a
    convolution; K where there is one run). `transposable`: N:M down the columns as well."""

    pattern: Pattern
    width: int
    transposable: bool = False

    def mask(self, score: Tensor) -> Tensor:
        """The mask that keeps the N highest of each group: non-negative (R, K) -> bool (R, K), K whole runs or one
        group of a run."""
        runs = score.unflatten(1, (-1, min(self.width, score.shape[1])))
        if self.transposable:
            tiles = [transposable_mask(runs[:, run], self.pattern, Axis(1), Axis(0)) for run in range(runs.shape[1])]
            return torch.stack(tiles, 1).flatten(1)
        return magnitude_mask(runs.flatten(0, 1), self.pattern, Axis(1)).view(score.shape)

    def slices(self, columns: int) -> Iterator[slice]:
        """The columns of each group, in order; the last of a run may be short."""
        for run in range(0, columns, self.width):
            for start in range(run, run + self.width, self.pattern.m):
                yield slice(start, min(start + self.pattern.m, run + self.width))


@dataclass(frozen=True)
class Solver:
    """How one layer is pruned. A solver is a subclass with a `solve`; what it returns is checked to be N:M.

    >>> import torch, openwork as ow
    >>> class FirstOnes(ow.Solver):
    ...     def solve(self, weight, gram, groups):
    ...         return weight * (torch.arange(weight.shape[1]) % 4 < 2)
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    >>> _ = ow.prune(model, "2:4", [torch.randn(64, 16)], solver=FirstOnes())
    >>> int((model[0].weight[:, :2] != 0).sum())
    16
    """

    needs_gram: ClassVar[bool] = True
    """Whether it takes the whole Gram matrix, not its diagonal alone."""

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        """The N:M weight for a dense one: (R, K) float32, `gram` (K, K), or (K,), its diagonal."""
        raise NotImplementedError


def diagonal(gram: Tensor) -> Tensor:
    """The sum of squares of each input (K,), of a Gram matrix (K, K) or its diagonal (K,)."""
    return gram.diagonal() if gram.ndim == 2 else gram


def damped(gram: Tensor, share: float) -> Tensor:
    """The Gram matrix plus `share` of its mean diagonal: invertible, also with inputs that are always zero. It stands
    for a pull towards the dense weights: the error is tr((W - W0) A (W - W0)') with A in place of H."""
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def energy(rows: Tensor, gram: Tensor) -> float:
    """tr(rows H rows'): the sum of squares of what these rows (R, K) make of the inputs whose Gram matrix is `gram`
    (K, K), or its diagonal (K,)."""
    gram = gram.to(rows.dtype)
    return float(((rows @ gram if gram.ndim == 2 else rows * gram) * rows).sum(dtype=torch.float64))


def relative_error(weight: Tensor, dense: Tensor, gram: Tensor) -> float:
    """||X (W - W0)'||^2 / ||X W0'||^2, of the outputs on the calibration samples; the Gram matrix, or its diagonal."""
    whole = energy(dense, gram)
    return energy(weight - dense, gram) / whole if whole else 0.0
