"""What `sparsify` leaves on a model: the pattern of each weight, the method, and who trains it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from openwork.methods import Method
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.training.forward_cache import ForwardCache
from openwork.training.optimizer_watch import OptimizerWatch
from openwork.training.parametrize import plain_name, sparse_weights
from openwork.utils.names import join


@dataclass
class SparsityRecord:
    """What `sparsify` leaves on the model's root: the pattern and axis of each weight, and who trains it.
    `output_axes`: those of weights that are N:M along them as well. `dense`: the weights that were left alone, and why;
    `exclude`: the globs that were given, which declare buffers dense as well."""

    weights: dict[str, tuple[Pattern, Axis]]
    method: Method
    cache: ForwardCache
    watch: OptimizerWatch
    hooks: tuple[Any, ...] = ()
    output_axes: dict[str, Axis] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()


def sparsity_records(model: nn.Module) -> list[tuple[str, nn.Module, SparsityRecord]]:
    """The (name, module, record) of every module in `model` that was handed to `sparsify`."""
    return [
        (name, module, module.__dict__["_openwork_record"])
        for name, module in model.named_modules()
        if "_openwork_record" in module.__dict__
    ]


def recorded_weights(model: nn.Module) -> dict[str, tuple[Pattern, Axis]]:
    """The (pattern, axis) that was recorded of each weight by its name in the plain model; none of methods that only
    watch."""
    return {
        join(plain_name(prefix), name): placed
        for prefix, _, record in sparsity_records(model)
        if record.method.sparse
        for name, placed in record.weights.items()
    }


def recorded_output_axes(model: nn.Module) -> dict[str, Axis]:
    """The output axes of the weights that are N:M along them as well, by name."""
    return {
        join(plain_name(prefix), name): axis
        for prefix, _, record in sparsity_records(model)
        for name, axis in record.output_axes.items()
    }


def recorded_dense(model: nn.Module) -> dict[str, str]:
    """The weights that sparsify left alone, by name, and why."""
    return {
        join(plain_name(prefix), name): reason
        for prefix, _, record in sparsity_records(model)
        for name, reason in record.dense.items()
    }


def recorded_excludes(model: nn.Module) -> tuple[str, ...]:
    """The globs of what was excluded, as names in `model`."""
    return tuple(
        join(plain_name(prefix), glob) for prefix, _, record in sparsity_records(model) for glob in record.exclude
    )


def unfinished_weights(model: nn.Module) -> dict[str, str]:
    """What the weights are whose method has a schedule that still runs, by name; empty once all have ended.

    "mask decay beta = 0.31: not yet 2:4 (step 690 of 1000)"
    """
    return {each.name: each.masked.unfinished for each in sparse_weights(model) if each.masked.unfinished}
