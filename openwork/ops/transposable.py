"""Transposable masks as an operator on lists: schema, reference, fake kernel. A GPU registers a faster one for 2:4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.nm.transposable import transposable_mask
from openwork.ops.library import axis_numbers, library, numbers, parsed, parsed_axes, reference

library.define("foreach_transposable_mask(Tensor[] scores, int n, int m, int[] axes, int[] output_axes) -> Tensor[]")


def foreach_transposable_mask(
    scores: Sequence[Tensor], pattern: Pattern, axes: Sequence[Axis], output_axes: Sequence[Axis]
) -> list[Tensor]:
    """`openwork.nm.transposable.transposable_mask` of each weight by whatever is fastest: bool, the shapes of the
    scores."""
    masks: list[Tensor] = torch.ops.openwork.foreach_transposable_mask.default(
        list(scores), *numbers(pattern, axes), axis_numbers(output_axes)
    )
    return masks


@reference("foreach_transposable_mask")
def transposable_reference(
    scores: list[Tensor], n: int, m: int, axes: list[int], output_axes: list[int]
) -> list[Tensor]:
    pattern, reduced = parsed(scores, n, m, axes)
    places = zip(scores, reduced, parsed_axes(scores, output_axes), strict=True)
    return [transposable_mask(score, pattern, *both) for score, *both in places]


@torch.library.register_fake("openwork::foreach_transposable_mask")
def _(scores: list[Tensor], n: int, m: int, axes: list[int], output_axes: list[int]) -> list[Tensor]:
    return [torch.empty_like(score, dtype=torch.bool) for score in scores]
