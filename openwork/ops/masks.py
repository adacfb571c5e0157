"""The mask of a weight as one operator, which a compiler calls instead of tracing into it.

On a CPU the eager code is meant to be faster than comparisons that the compiler fuses: along the input channels of a
convolution these read memory in strides, which the fused loop does not vectorize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.axis import Axis
from openwork.masks import keep_largest as definition
from openwork.pattern import Pattern


@torch.library.custom_op("openwork::keep_largest", mutates_args=())
def _keep_largest(score: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> Tensor:
    return definition(score, Pattern(n, m), Axis(dim, blocks, flat))


@_keep_largest.register_fake
def _(score: Tensor, n: int, m: int, dim: int, blocks: int, flat: bool) -> Tensor:
    return torch.empty_like(score, dtype=torch.bool)


def keep_largest(score: Tensor, pattern: Pattern, axis: Axis) -> Tensor:
    """`openwork.masks.keep_largest`, as an operator where a compiler for the CPU asks: bool, the shape of `score`."""
    if torch.compiler.is_compiling() and score.device.type == "cpu":
        mask: Tensor = _keep_largest(score, pattern.n, pattern.m, axis.dim, axis.blocks, axis.flat)
        return mask
    return definition(score, pattern, axis)
