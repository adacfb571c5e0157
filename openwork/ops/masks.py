"""Masks as operators: a schema, the reference, a fake kernel for tracing. `openwork.kernels` registers faster versions.

A compiler calls these instead of tracing into them. The axis travels as three numbers, the fields of `Axis`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask as select
from openwork.nm.masks import magnitude_mask as definition
from openwork.nm.pattern import Pattern

RANKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Where = tuple[int, int, bool]
"""The fields of `Axis`, as operators take them: dim, blocks, flat."""

_WHERE = "int n, int m, int dim, int blocks, bool flat"
_WHERE_EACH = "int n, int m, int[] dims, int[] blocks, bool[] flat"

ON_LISTS = (torch.Tag.cudagraph_unsafe,)
"""Tags of operators that take lists: compilers are to leave them out of CUDA graphs, since a list is a table of
addresses."""

library = torch.library.Library("openwork", "FRAGMENT")
library.define(f"keep_largest(Tensor score, {_WHERE}) -> Tensor")
library.define(f"prune(Tensor weight, {_WHERE}) -> Tensor")
library.define(f"add_decayed(Tensor(a!) gradient, Tensor weight, float rate, {_WHERE}) -> ()")
library.define(f"keep_largest_list(Tensor[] scores, {_WHERE_EACH}) -> Tensor[]", tags=ON_LISTS)
library.define(f"prune_list(Tensor[] weights, {_WHERE_EACH}) -> Tensor[]", tags=ON_LISTS)
library.define(
    f"add_decayed_list(Tensor(a!)[] gradients, Tensor[] weights, float rate, {_WHERE_EACH}) -> ()", tags=ON_LISTS
)


def keep_largest(score: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """`openwork.nm.masks.magnitude_mask` by whatever is fastest: bool, the shape of `score`, which is non-negative or
    NaN."""
    if not for_operator(score):
        return definition(score, pattern, axis)
    mask: Tensor = torch.ops.openwork.keep_largest.default(score, *_numbers(pattern, axis))
    return mask


def prune(weight: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """The weight with all but the N largest magnitudes of each group set to +0.0, in one pass. Not differentiable."""
    if not for_operator(weight):
        return select(weight, definition(weight.abs(), pattern, axis))
    pruned: Tensor = torch.ops.openwork.prune.default(weight, *_numbers(pattern, axis))
    return pruned


def add_decayed(gradient: Tensor, weight: Tensor, rate: float, pattern: Pattern, axis: Axis) -> None:
    """gradient += rate * weight where `prune` prunes, in place and in one pass."""
    if not for_operator(weight) or not for_operator(gradient):
        _add_decayed(gradient, weight, rate, *_numbers(pattern, axis))
    else:
        torch.ops.openwork.add_decayed.default(gradient, weight, rate, *_numbers(pattern, axis))


def keep_largest_list(scores: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """`keep_largest` of many weights that share a pattern: on a GPU in one launch."""
    masks: list[Tensor] = torch.ops.openwork.keep_largest_list.default(list(scores), *_numbers_each(pattern, axes))
    return masks


def prune_list(weights: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis]) -> list[Tensor]:
    """`prune` of many weights that share a pattern: on a GPU in one launch."""
    pruned: list[Tensor] = torch.ops.openwork.prune_list.default(list(weights), *_numbers_each(pattern, axes))
    return pruned


def add_decayed_list(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], rate: float, pattern: Pattern, axes: Sequence[Axis]
) -> None:
    """`add_decayed` for many weights that share a pattern: on a GPU in one launch."""
    where = _numbers_each(pattern, axes)
    torch.ops.openwork.add_decayed_list.default(list(gradients), list(weights), rate, *where)


def for_operator(tensor: Tensor) -> bool:
    """Whether the tensor is a plain one, for which there are operators: subclasses have their own rules."""
    plain = torch.compiler.is_compiling() or type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type in ("cpu", "cuda") and tensor.dtype in RANKED


def _numbers(pattern: Pattern, axis: Axis) -> tuple[int, int, int, int, bool]:
    return pattern.n, pattern.m, axis.dim, axis.blocks, axis.flat


def _numbers_each(pattern: Pattern, axes: Sequence[Axis]) -> tuple[int, int, list[int], list[int], list[bool]]:
    dims, blocks, flat = [a.dim for a in axes], [a.blocks for a in axes], [a.flat for a in axes]
    return pattern.n, pattern.m, dims, blocks, flat


def parsed(weight: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> tuple[Pattern, Axis]:
    """The numbers of an operator as what they mean. Raises ValueError where they do not fit the weight."""
    if not flat and not (0 <= dim < weight.ndim and blocks >= 1 and weight.shape[dim] % blocks == 0):
        raise ValueError(
            f"{Axis(dim, blocks)} does not fit shape {tuple(weight.shape)}: needed one of its dims, in equal blocks"
        )
    return Pattern(n, m), Axis(dim, blocks, flat)


def check_alike(gradient: Tensor, weight: Tensor) -> None:
    if gradient.shape != weight.shape:
        raise ValueError(
            f"a gradient {tuple(gradient.shape)} for a weight {tuple(weight.shape)}; needed the same shape"
        )


@torch.library.impl(library, "keep_largest", "CompositeExplicitAutograd")
def _keep_largest(score: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> Tensor:
    return definition(score, *parsed(score, n, m, dim, blocks, flat))


@torch.library.impl(library, "prune", "CompositeExplicitAutograd")
def _prune(weight: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> Tensor:
    return select(weight, definition(weight.abs(), *parsed(weight, n, m, dim, blocks, flat)))


@torch.library.impl(library, "add_decayed", "CompositeExplicitAutograd")
def _add_decayed(gradient: Tensor, weight: Tensor, rate: float, *where: Any) -> None:
    check_alike(gradient, weight)
    keep = definition(weight.abs(), *parsed(weight, *where))
    gradient.add_(select(weight, ~keep).mul_(rate))


@torch.library.impl(library, "keep_largest_list", "CompositeExplicitAutograd")
def _keep_largest_list(
    scores: list[Tensor], n: int, m: int, dims: list[int], blocks: list[int], flat: list[bool]
) -> list[Tensor]:
    keep = torch.ops.openwork.keep_largest.default
    return [keep(score, n, m, *where) for score, *where in zip(scores, dims, blocks, flat, strict=True)]


@torch.library.impl(library, "prune_list", "CompositeExplicitAutograd")
def _prune_list(
    weights: list[Tensor], n: int, m: int, dims: list[int], blocks: list[int], flat: list[bool]
) -> list[Tensor]:
    one = torch.ops.openwork.prune.default
    return [one(weight, n, m, *where) for weight, *where in zip(weights, dims, blocks, flat, strict=True)]


@torch.library.impl(library, "add_decayed_list", "CompositeExplicitAutograd")
def _add_decayed_list(
    gradients: list[Tensor],
    weights: list[Tensor],
    rate: float,
    n: int,
    m: int,
    dims: list[int],
    blocks: list[int],
    flat: list[bool],
) -> None:
    add = torch.ops.openwork.add_decayed.default
    for gradient, weight, *where in zip(gradients, weights, dims, blocks, flat, strict=True):
        add(gradient, weight, rate, n, m, *where)


@torch.library.register_fake("openwork::keep_largest_list")
def _(scores: list[Tensor], *where: Any) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for score in scores]


@torch.library.register_fake("openwork::prune_list")
def _(weights: list[Tensor], *where: Any) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


@torch.library.register_fake("openwork::add_decayed_list")
def _(gradients: list[Tensor], *where: Any) -> None:
    return None


@torch.library.register_fake("openwork::keep_largest")
def _(score: Tensor, *where: Any) -> Tensor:
    return torch.empty_like(score, dtype=torch.bool)


@torch.library.register_fake("openwork::prune")
def _(weight: Tensor, *where: Any) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("openwork::add_decayed")
def _(gradient: Tensor, weight: Tensor, rate: float, *where: Any) -> None:
    return None


def _batched(operator: Any) -> Any:
    def rule(info: Any, dims: tuple[Any, ...], score: Tensor, *where: Any) -> tuple[Tensor, int]:
        return torch.stack([operator(each, *where) for each in score.unbind(dims[0])]), 0

    return rule


torch.library.register_vmap("openwork::keep_largest", _batched(torch.ops.openwork.keep_largest))
torch.library.register_vmap("openwork::prune", _batched(torch.ops.openwork.prune))
