"""Whether the weights of a checkpoint are N:M, whoever wrote it, and along which axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openwork.files.reader import Contents
from openwork.kernels.cpu.counts import too_dense
from openwork.nm.groups import Axis, reduction_size
from openwork.nm.pattern import Pattern
from openwork.training.select import HELD
from openwork.training.selection import matches
from openwork.training.verify import tightest
from openwork.utils.counted import counted

WEIGHTS = (*HELD, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of tensors that are weights, where they have two dims or more."""


@dataclass(frozen=True)
class WeightPattern:
    """One weight of a checkpoint. `axes` are those along which `pattern` holds: "dim 1" (inputs of linear layers and
    convolutions), "dim 0", the last one, "flattened". Where there is none, `problem` says what was found; it is not
    `divisible` where M does not divide dim 1, so that no library could have made it N:M along the inputs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pattern: Pattern | None
    axes: tuple[str, ...] = ()
    problem: str = ""
    divisible: bool = True


def weight_patterns(
    contents: Contents, pattern: Pattern | None = None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[WeightPattern, ...]:
    """Every weight of two dims or more that `include` names (all, by default) and `exclude` does not: held to
    `pattern`, or else with the tightest pattern that it has along some axis. One weight is in memory at a time.

    Raises ValueError for a glob that names no weight.
    """
    tensors = contents.tensors
    weights = [name for name in tensors if len(tensors[name].shape) > 1 and tensors[name].dtype in WEIGHTS]
    for glob in (*include, *exclude):
        if not any(matches(glob, name) for name in weights):
            raise ValueError(
                f"{glob!r} names none of the {counted(len(weights), 'weight')}, such as {', '.join(weights[:3])}"
            )
    included = [name for name in weights if not include or any(matches(glob, name) for glob in include)]
    names = [name for name in included if not any(matches(glob, name) for glob in exclude)]
    if not names:
        raise ValueError("there is no weight to check: no float or int8 tensor of two dims or more")
    return tuple(_found(name, contents.read(name), pattern) for name in names)


def _found(name: str, weight: Tensor, pattern: Pattern | None) -> WeightPattern:
    if not weight.numel():
        return WeightPattern(name, tuple(weight.shape), weight.dtype, pattern, problem="it is empty", divisible=False)
    known = weight if weight.dtype in HELD else weight.float()
    found = _tightest(name, known) if pattern is None else _held(name, known, pattern)
    return replace(found, dtype=weight.dtype)


def _axes(shape: tuple[int, ...]) -> dict[str, Axis]:
    """The axes that libraries group weights along, by name."""
    dims = dict.fromkeys([1, 0, len(shape) - 1])
    return {f"dim {dim}": Axis(dim) for dim in dims} | ({"flattened": Axis(flat=True)} if len(shape) > 2 else {})


def _held(name: str, weight: Tensor, pattern: Pattern) -> WeightPattern:
    shape = tuple(weight.shape)
    axes = {text: axis for text, axis in _axes(shape).items() if reduction_size(shape, axis) % pattern.m == 0}
    problems = {text: too_dense(weight, pattern, axis) for text, axis in axes.items()}
    holds = tuple(text for text, problem in problems.items() if not problem)
    if holds:
        return WeightPattern(name, shape, weight.dtype, pattern, holds)
    if "dim 1" not in problems:
        problem = f"dim 1 has {counted(shape[1], 'weight')}, not a multiple of {pattern.m}"
        return WeightPattern(name, shape, weight.dtype, pattern, problem=problem, divisible=False)
    return WeightPattern(name, shape, weight.dtype, pattern, problem=f"along dim 1 {problems['dim 1']}")


def _tightest(name: str, weight: Tensor) -> WeightPattern:
    shape = tuple(weight.shape)
    by_axis: Mapping[str, Pattern] = {text: tightest(weight, axis) for text, axis in _axes(shape).items()}
    best = min(by_axis.values(), key=lambda pattern: (pattern.density, pattern.m))
    if best.is_dense:
        return WeightPattern(name, shape, weight.dtype, None, problem="no N:M pattern with N < M holds")
    axes = tuple(text for text, pattern in by_axis.items() if pattern == best)
    return WeightPattern(name, shape, weight.dtype, best, axes)
