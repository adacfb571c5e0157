"""Transposable masks as an operator: schema, reference, fake kernel. A GPU registers a faster one for 2:4."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.nm.transposable import transposable_mask as definition
from openwork.ops.masks import library

library.define("keep_transposable(Tensor score, int n, int m, int dim, int output_axis) -> Tensor")


def keep_transposable(score: Tensor, pattern: Pattern, axis: Axis, output_axis: Axis) -> Tensor:
    """`openwork.nm.transposable.transposable_mask` by whatever is fastest: bool, the shape of `score`."""
    mask: Tensor = torch.ops.openwork.keep_transposable.default(score, pattern.n, pattern.m, axis.dim, output_axis.dim)
    return mask


@torch.library.impl(library, "keep_transposable", "CompositeExplicitAutograd")
def _keep_transposable(score: Tensor, n: int, m: int, dim: int, output_axis: int) -> Tensor:
    return definition(score, Pattern(n, m), Axis(dim), Axis(output_axis))


@torch.library.register_fake("openwork::keep_transposable")
def _(score: Tensor, n: int, m: int, dim: int, output_axis: int) -> Tensor:
    return torch.empty_like(score, dtype=torch.bool)
