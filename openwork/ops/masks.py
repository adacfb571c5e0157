"""Masks by magnitude as operators on lists ("foreach"): schema, reference, fake kernel. One weight is a list of one.

A compiler calls these instead of tracing into them. A kernel may take a list in one launch; while a CUDA graph is
captured, which would have to hold the list's table of addresses, it launches once for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.library import has_operators, library, numbers, parsed, reference

library.define("foreach_mask(Tensor[] scores, int n, int m, int[] axes) -> Tensor[]")
library.define("foreach_prune(Tensor[] weights, int n, int m, int[] axes) -> Tensor[]")
library.define("foreach_decay(Tensor(a!)[] gradients, Tensor[] weights, float rate, int n, int m, int[] axes) -> ()")


def foreach_mask(scores: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """`openwork.nm.masks.magnitude_mask` of each weight by whatever is fastest: bool, the shapes of the scores, which
    are non-negative or NaN."""
    run = torch.ops.openwork.foreach_mask.default if has_operators(*scores) else mask_reference
    masks: list[Tensor] = run(list(scores), *numbers(pattern, axes))
    return masks


def foreach_prune(weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """Each weight with all but the N largest magnitudes of its groups set to +0.0, in one pass. Not differentiable."""
    run = torch.ops.openwork.foreach_prune.default if has_operators(*weights) else prune_reference
    pruned: list[Tensor] = run(list(weights), *numbers(pattern, axes))
    return pruned


def foreach_decay(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], rate: float, pattern: Pattern, axes: Sequence[Axis]
) -> None:
    """gradient += rate * weight where `foreach_prune` prunes, for each weight, in place and in one pass. Raises
    ValueError where the rate is not finite."""
    known = has_operators(*gradients, *weights)
    run = torch.ops.openwork.foreach_decay.default if known else decay_reference
    run(list(gradients), list(weights), rate, *numbers(pattern, axes))


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError where a decay is not finite: an infinite one times a weight of 0 is NaN."""
    if not isinstance(rate, Real) or not math.isfinite(rate):
        raise ValueError(f"{name}={rate!r}; needed a finite number")


def check_decay(gradients: Sequence[Tensor], weights: Sequence[Tensor], rate: float) -> None:
    """Raises ValueError unless the rate is finite and every gradient has the shape of its weight."""
    check_rate("rate", rate)
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient.shape != weight.shape:
            raise ValueError(
                f"a gradient {tuple(gradient.shape)} for a weight {tuple(weight.shape)}; needed the same shape"
            )


@reference("foreach_mask")
def mask_reference(scores: list[Tensor], n: int, m: int, axes: list[int]) -> list[Tensor]:
    pattern, places = parsed(scores, n, m, axes)
    return [magnitude_mask(score, pattern, axis) for score, axis in zip(scores, places, strict=True)]


@reference("foreach_prune")
def prune_reference(weights: list[Tensor], n: int, m: int, axes: list[int]) -> list[Tensor]:
    pattern, places = parsed(weights, n, m, axes)
    return [
        apply_mask(weight, magnitude_mask(weight.abs(), pattern, axis))
        for weight, axis in zip(weights, places, strict=True)
    ]


@reference("foreach_decay")
def decay_reference(
    gradients: list[Tensor], weights: list[Tensor], rate: float, n: int, m: int, axes: list[int]
) -> None:
    check_decay(gradients, weights, rate)
    pattern, places = parsed(weights, n, m, axes)
    for gradient, weight, axis in zip(gradients, weights, places, strict=True):
        add_decay(gradient, weight, rate, magnitude_mask(weight.abs(), pattern, axis))


def add_decay(gradient: Tensor, weight: Tensor, rate: float, mask: Tensor) -> None:
    """gradient += rate * weight where the mask prunes, in place."""
    gradient.add_(apply_mask(weight, ~mask).mul_(rate))


@torch.library.register_fake("openwork::foreach_mask")
def _(scores: list[Tensor], n: int, m: int, axes: list[int]) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for score in scores]


@torch.library.register_fake("openwork::foreach_prune")
def _(weights: list[Tensor], n: int, m: int, axes: list[int]) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


@torch.library.register_fake("openwork::foreach_decay")
def _(gradients: list[Tensor], weights: list[Tensor], rate: float, n: int, m: int, axes: list[int]) -> None:
    return None


def _batched(operator: Any) -> Any:
    """The rule of vmap: the weights of a batch are one list."""

    def rule(
        info: Any, dims: tuple[Any, ...], weights: list[Tensor], n: int, m: int, axes: list[int]
    ) -> tuple[list[Tensor], list[int | None]]:
        apart = [
            [weight] if dim is None else list(weight.unbind(dim)) for weight, dim in zip(weights, dims[0], strict=True)
        ]
        places = [number for i, parts in enumerate(apart) for number in axes[3 * i : 3 * i + 3] * len(parts)]
        results = iter(operator([part for parts in apart for part in parts], n, m, places))
        return [
            next(results) if dim is None else torch.stack([next(results) for _ in parts])
            for parts, dim in zip(apart, dims[0], strict=True)
        ], [None if dim is None else 0 for dim in dims[0]]

    return rule


torch.library.register_vmap("openwork::foreach_mask", _batched(torch.ops.openwork.foreach_mask.default))
torch.library.register_vmap("openwork::foreach_prune", _batched(torch.ops.openwork.foreach_prune.default))
