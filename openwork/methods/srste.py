"""SR-STE: the sparse-refined straight-through estimator (Zhou et al., ICLR 2021, arXiv:2102.04010).

    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
    before a step  g  = g + decay * w where pruned, once, after unscaling, reducing, accumulating, clipping

The authors add the term inside autograd, where a loss scale divides it and accumulation or reuse of a weight
multiplies it. Here `attach` adds it, outside autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork import ops
from openwork.methods.autograd import straight_through, straight_through_largest, straight_through_largest_list
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask
from openwork.nm.pattern import Pattern


@dataclass(frozen=True)
class SRSTE:
    """STE that shrinks the pruned weights, so that the mask settles. `decay` 0 is STE.

    The default is the authors' for 600,000 steps of ImageNet. Where decay times the summed learning rate is far
    below 1 it has no effect, so short runs want more: 0.02 suited a thousand steps (docs/topology.md).
    """

    decay: float = 2e-4

    name: ClassVar[str] = "sr-ste"
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

    def gradient_term(self, weight: Tensor, keep: Tensor) -> Tensor:
        return apply_mask(weight, ~keep).mul_(self.decay)

    def add_term_in_one_pass(self, gradient: Tensor, weight: Tensor, pattern: Pattern, axis: Axis) -> None:
        ops.foreach_decay([gradient], [weight], self.decay, pattern, [axis])

    def add_terms_in_one_pass(
        self, gradients: Sequence[Tensor], weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]
    ) -> None:
        ops.foreach_decay(gradients, weights, self.decay, pattern, axes)
