"""The formulas of a method as functions that autograd knows. They save nothing for it, so that a weight may be masked
once and used in several checkpointed regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openwork.methods.method import Method, State
from openwork.methods.schedule import Phase
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_prune


def straight_through(weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """The weights with all but the N largest magnitudes of each group pruned, in one pass; the gradient of each flows
    by itself, as if nothing had been pruned."""
    pruned = foreach_prune([weight.detach() for weight in weights], pattern, axes)
    return [_StraightThrough.apply(*pair) for pair in zip(weights, pruned, strict=True)]


def masked(method: Method, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
    """What a method makes of a weight by its `forward`, with the gradient of its `backward`."""
    return _Masked.apply(weight, mask, phase.beta, *state.values(), method, phase, tuple(state))


class _StraightThrough(torch.autograd.Function):
    """Something computed from the first argument, which gets its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:  # torch looks at every parameter of the signature in every call
        return inputs[1].detach()  # as an input that is returned it could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Masked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # torch looks at every parameter of the signature in every call
        weight, mask, beta, *tensors, method, phase, names = inputs
        pruned: Tensor = method.forward(weight, mask, _with(phase, beta), dict(zip(names, tensors, strict=True)))
        return pruned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inputs = len(inputs)
        ctx.method = inputs[-3]
        if ctx.method.overrides("backward"):
            # Plain attributes: a mask and a method's state need no version check.
            ctx.mask, ctx.beta, *ctx.tensors = inputs[1:-3]
            ctx.phase, ctx.names = inputs[-2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.method.overrides("backward"):
            state = dict(zip(ctx.names, ctx.tensors, strict=True))
            gradient = ctx.method.backward(gradient, ctx.mask, _with(ctx.phase, ctx.beta), state)
        return gradient, *[None] * (ctx.inputs - 1)


def _with(phase: Phase, beta: Tensor | float) -> Phase:
    """The phase with the beta that a transform or a compiler handed in."""
    return phase if beta is phase.beta else replace(phase, beta=beta)
