"""The ways a gradient passes a mask. They save nothing for autograd, so that a weight may be masked once
and used in several checkpointed regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openwork import ops
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask
from openwork.nm.pattern import Pattern


def straight_through(weight: Tensor, keep: Tensor) -> Tensor:
    """The pruned weight; the gradient flows as if nothing had been pruned. Shapes: all equal."""
    return _StraightThrough.apply(weight, keep)


def straight_through_largest(weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """`straight_through` for the mask of the N largest magnitudes, without making the mask."""
    return _StraightThroughLargest.apply(weight, pattern, axis)


def straight_through_largest_list(weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """`straight_through_largest` of many weights, on a GPU in one launch. Gradients flow to each by itself."""
    pruned = ops.foreach_prune([weight.detach() for weight in weights], pattern, axes)
    return [_StraightThroughTo.apply(weight, each) for weight, each in zip(weights, pruned, strict=True)]


def masked_gradient(weight: Tensor, keep: Tensor) -> Tensor:
    """The pruned weight; pruned positions get gradient zero. Shapes: all equal."""
    return _MaskedGradient.apply(weight, keep)


class _Straight(torch.autograd.Function):
    """What the gradient passes unchanged on its way to the first argument."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class _StraightThrough(_Straight):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, keep: Tensor) -> Tensor:
        return apply_mask(weight, keep)


class _StraightThroughLargest(_Straight):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
        return ops.foreach_prune([weight], pattern, [axis])[0]


class _StraightThroughTo(_Straight):
    @staticmethod
    def forward(weight: Tensor, pruned: Tensor) -> Tensor:
        return pruned


class _MaskedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, keep: Tensor) -> Tensor:
        return apply_mask(weight, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.keep = inputs[1]  # a plain attribute: it is a stored mask, needing no version check

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return apply_mask(grad, ctx.keep), None
