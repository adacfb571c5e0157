"""STE: the straight-through estimator with a mask that follows the weights (Bengio et al., 2013, arXiv:1308.3432,
for N:M in Zhou et al., ICLR 2021, arXiv:2102.04010, the baseline there).

    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.methods.autograd import straight_through, straight_through_largest, straight_through_largest_list
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern


@dataclass(frozen=True)
class STE:
    """Train from scratch; pruned weights keep learning and may come back."""

    name: ClassVar[str] = "ste"
    fixed: ClassVar[bool] = False
    sparse: ClassVar[bool] = True

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def forward(self, weight: Tensor, keep: Tensor) -> Tensor:
        return straight_through(weight, keep)

    def forward_in_one_pass(self, weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
        return straight_through_largest(weight, pattern, axis)

    def forwards_in_one_pass(self, weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
        return straight_through_largest_list(weights, pattern, axes)
