"""The formulas of a method as functions that autograd knows, backward and forward: a tangent goes through the
transposed map of the gradient. They save nothing for it, so that a weight may be masked once and used in several
checkpointed regions."""

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
from openwork.utils.torch_private import is_transformed, transforms


def straight_through(weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """The weights with all but the N largest magnitudes of each group pruned, in one pass; the gradient of each flows
    by itself, as if nothing had been pruned."""
    pruned = foreach_prune([weight.detach() for weight in weights], pattern, axes)
    if any(_transformed(weight) for weight in weights):
        return [_with_derivative(*pair) for pair in zip(pruned, weights, strict=True)]
    function = _straight_through_here()
    return [function.apply(*pair) for pair in zip(weights, pruned, strict=True)]


def _straight_through_here() -> Any:
    if torch.compiler.is_compiling():
        return _StraightThrough
    return _StraightThroughWithTangents if transforms() else _StraightThroughAlone


def masked(method: Method, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
    """What a method makes of a weight by its `forward`, with the gradient of its `backward`."""
    if _transformed(weight) and (method.elementwise or not method.overrides("backward")):
        pruned = method.forward(weight.detach(), mask, phase, state)
        own = method.overrides("backward")  # each position times its own number: a map that is its own transpose
        return _with_derivative(pruned, method.backward(weight, mask, phase, state) if own else weight)
    function = _Masked if torch.compiler.is_compiling() else _MaskedWithTangents
    return function.apply(weight, mask, phase.beta, *state.values(), method, phase, tuple(state))


def _transformed(weight: Tensor) -> bool:
    return not torch.compiler.is_compiling() and is_transformed(weight)


def _with_derivative(value: Tensor, like: Tensor) -> Tensor:
    """The value, with the derivatives of another tensor, in operators that every transform of `torch.func` takes in
    every order: functions with rules of their own do not nest."""
    return value + (like - like.detach())


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


class _StraightThroughWithTangents(_StraightThrough):
    """The same with forward derivatives, beside which compilers take no function."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()  # torch wants a tangent of the output's own


class _StraightThroughAlone(torch.autograd.Function):
    """The same where no transform of `torch.func` runs. With `setup_context` torch looks at the signature in every
    call, a sixth of all that is done for a weight beside its kernel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pruned: Tensor) -> Tensor:
        return pruned.detach()

    backward = _StraightThrough.backward
    jvp = _StraightThroughWithTangents.jvp


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
        return _gradient(ctx, gradient), *[None] * (ctx.inputs - 1)


class _MaskedWithTangents(_Masked):
    """The same with forward derivatives, beside which compilers take no function."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        if not ctx.method.overrides("backward"):
            return tangent.clone()
        if ctx.method.elementwise:  # each position times its own number, which is its own transpose
            return _gradient(ctx, tangent)
        zero = torch.zeros_like(tangent)
        (transposed,) = torch.func.vjp(lambda gradient: _gradient(ctx, gradient), zero)[1](tangent)
        return transposed


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    """The gradient of the dense weight, by the method's `backward`."""
    if not ctx.method.overrides("backward"):
        return gradient
    state = dict(zip(ctx.names, ctx.tensors, strict=True))
    made: Tensor = ctx.method.backward(gradient, ctx.mask, _with(ctx.phase, ctx.beta), state)
    return made


def _with(phase: Phase, beta: Tensor | float) -> Phase:
    """The phase with the beta that a transform or a compiler handed in."""
    return phase if beta is phase.beta else replace(phase, beta=beta)
