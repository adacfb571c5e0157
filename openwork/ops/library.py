"""The one library of operators, and how a pattern and axes travel through them: as numbers.

An operator is a schema, a reference that runs on every device, and a fake kernel for tracing; all three stand in one
file of this room. `openwork.kernels.registry` says which faster kernels run it where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted

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
    flat: list[int] = []
    for axis in axes:
        flat += (axis.dim, axis.blocks, int(axis.flat))
    return flat


def parsed(weights: Sequence[Tensor], n: int, m: int, axes: Sequence[int]) -> tuple[Pattern, tuple[Axis, ...]]:
    """What the numbers of an operator mean. Raises ValueError where they do not fit the weights."""
    return _pattern(n, m), parsed_axes(weights, axes)


def parsed_axes(weights: Sequence[Tensor], axes: Sequence[int]) -> tuple[Axis, ...]:
    """The axis of each weight from its three numbers. Raises ValueError where they do not fit the weights."""
    places = _axes(tuple(axes))
    if len(places) != len(weights):
        raise ValueError(
            f"numbers for {counted(len(places), 'axis', 'axes')}, and {counted(len(weights), 'weight')}; needed as many"
        )
    for weight, axis in zip(weights, places, strict=True):
        fits = axis.flat or (0 <= axis.dim < weight.ndim and axis.blocks >= 1)
        if not fits or (axis.blocks > 1 and weight.shape[axis.dim] % axis.blocks):
            raise ValueError(
                f"{axis} does not fit shape {tuple(weight.shape)}: needed one of its dims, in equal blocks"
            )
    return places


# Remembered: a model asks the same in every step, and a small weight is masked in less time.
@functools.lru_cache(maxsize=1024)
def _pattern(n: int, m: int) -> Pattern:
    return Pattern(n, m)


@functools.lru_cache(maxsize=1024)
def _axes(numbers: tuple[int, ...]) -> tuple[Axis, ...]:
    if len(numbers) % 3:
        raise ValueError(f"{counted(len(numbers), 'number')} for axes; needed three for each")
    return tuple(Axis(dim, blocks, bool(flat)) for dim, blocks, flat in zip(*[iter(numbers)] * 3, strict=True))


def has_operators(*tensors: Tensor) -> bool:
    """Whether tensors are plain ones, for which there are operators: subclasses have their own rules."""
    compiling = torch.compiler.is_compiling()
    for tensor in tensors:
        plain = compiling or type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
        if not plain or tensor.device.type not in ("cpu", "cuda") or tensor.dtype not in RANKED:
            return False
    return True
