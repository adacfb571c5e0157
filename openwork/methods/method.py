"""What a method is. To add one: copy `ste.py`, write its equation on top, change two lines, add a test."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Method(Protocol):
    """A rule that turns a dense weight into the weight that the forward pass uses.

    The weight, the mask `keep` (bool, True means kept), and all results have one shape.
    A method whose update has a further term also defines
    `gradient_term(weight, keep)`: what `attach` adds to the gradient, once per optimizer step.

    A method that ranks by magnitude may do without the mask, and is then faster where there is a kernel for it:
    `forward_in_one_pass(weight, pattern, axis)`, and `add_term_in_one_pass(gradient, weight, pattern, axis)` in place;
    `forwards_in_one_pass(weights, pattern, axes)` and `add_terms_in_one_pass(gradients, weights, pattern, axes)` do
    that for many weights in one launch of a GPU.

    `refresh_every` says that the mask is stored and chosen anew by `attach` after so many optimizer steps, and
    `transposable = True` that it is N:M along the output axis as well.
    """

    name: ClassVar[str]
    """The field's name for it: "sr-ste"."""
    fixed: ClassVar[bool]
    """True: the mask is chosen once, by `sparsify`, and stored. False: recomputed in every forward, unless the method
    says `refresh_every`."""
    sparse: ClassVar[bool]
    """False for methods that only observe the mask and zero nothing."""

    def score(self, weight: Tensor) -> Tensor:
        """What each weight of a group is ranked by, non-negative; the N highest are kept."""

    def forward(self, weight: Tensor, keep: Tensor) -> Tensor:
        """The weight that the layer multiplies with, differentiable in `weight`."""


def is_transposable(method: Method) -> bool:
    """Whether masks of the method are N:M along the output axis as well."""
    return getattr(method, "transposable", False)


def steps_of_a_mask(method: Method) -> int:
    """After how many optimizer steps a stored mask is chosen anew; 0 where that never happens."""
    return getattr(method, "refresh_every", 0)


def stores_mask(method: Method) -> bool:
    """Whether masks are kept between forwards, instead of being recomputed from the weight."""
    return method.fixed or steps_of_a_mask(method) > 0
