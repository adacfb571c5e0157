"""The one library of operators, and how a pattern and axes travel through them: as numbers.

An operator is a schema, a reference that runs on every device, and a fake kernel for tracing; all three stand in one
file of this room. `openwork.kernels.registry` says which faster kernels run it where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern

RANKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes whose magnitudes the operators rank."""

NO_GRAPH = (torch.Tag.cudagraph_unsafe,)
"""Tags of operators that compilers are to leave out of CUDA graphs."""

Function = TypeVar("Function", bound=Callable[..., Any])

library = torch.library.Library("openwork", "FRAGMENT")

REFERENCES: dict[str, Callable[..., Any]] = {}
"""The reference of each operator, by name."""


def reference(operator: str) -> Callable[[Function], Function]:
    """Makes a function the reference of an operator: what runs where no kernel is registered."""

    def registered(function: Function) -> Function:
        torch.library.impl(library, operator, "CompositeExplicitAutograd")(function)
        REFERENCES[operator] = function
        return function

    return registered


def numbers(pattern: Pattern, axes: Sequence[Axis]) -> tuple[int, int, list[int]]:
    """A pattern and the axes of weights as operators take them: n, m, and three numbers an axis.

    >>> numbers(Pattern(2, 4), [Axis(1), Axis(0, blocks=2)])
    (2, 4, [1, 1, 0, 0, 2, 0])
    """
    return pattern.n, pattern.m, axis_numbers(axes)


def axis_numbers(axes: Sequence[Axis]) -> list[int]:
    """The dim, blocks and flat of each axis, one after the other."""
    return [number for axis in axes for number in (axis.dim, axis.blocks, int(axis.flat))]


def parsed(weights: Sequence[Tensor], n: int, m: int, axes: Sequence[int]) -> tuple[Pattern, list[Axis]]:
    """What the numbers of an operator mean. Raises ValueError where they do not fit the weights."""
    return Pattern(n, m), parsed_axes(weights, axes)


def parsed_axes(weights: Sequence[Tensor], axes: Sequence[int]) -> list[Axis]:
    """The axis of each weight from its three numbers. Raises ValueError where they do not fit the weights."""
    if len(axes) != 3 * len(weights):
        raise ValueError(f"{len(axes)} numbers for the axes of {len(weights)} weights; needed three for each")
    return [_axis_of(weight, *axes[3 * i : 3 * i + 3]) for i, weight in enumerate(weights)]


def _axis_of(weight: Tensor, dim: int, blocks: int, flat: int) -> Axis:
    if not flat and not (0 <= dim < weight.ndim and blocks >= 1 and weight.shape[dim] % blocks == 0):
        raise ValueError(
            f"{Axis(dim, blocks)} does not fit shape {tuple(weight.shape)}: needed one of its dims, in equal blocks"
        )
    return Axis(dim, blocks, bool(flat))


def has_operators(*tensors: Tensor) -> bool:
    """Whether tensors are plain ones, for which there are operators: subclasses have their own rules."""
    compiling = torch.compiler.is_compiling()
    return all(
        (compiling or type(tensor) in (Tensor, torch.nn.Parameter))
        and tensor.device.type in ("cpu", "cuda")
        and tensor.dtype in RANKED
        for tensor in tensors
    )
