"""What `sparsify` leaves on a model: the pattern of each weight, the method, and who trains it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from openwork.methods import Method
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.training.forward_cache import ForwardCache
from openwork.training.masked import Masked
from openwork.training.optimizer_watch import OptimizerWatch
from openwork.training.parametrize import SparseWeight, plain_name, sparse_weights, sparse_weights_of
from openwork.utils.names import join


@dataclass
class SparsityRecord:
    """What `sparsify` leaves on the model's root: what masks each weight, by name, also where its module was swapped
    since, and who trains it. `dense`: the weights that were left alone, and why; `exclude`: the globs that were given,
    which declare buffers dense as well."""

    masks: dict[str, Masked]
    method: Method
    cache: ForwardCache
    watch: OptimizerWatch
    hooks: tuple[Any, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, tuple[Pattern, Axis]]:
        """The pattern and axis of each weight, at the end of the method's schedule."""
        return {name: (masked.end.pattern, masked.end.axis) for name, masked in self.masks.items()}

    @property
    def output_axes(self) -> dict[str, Axis]:
        """The output axes of those that are N:M along them as well."""
        return {name: masked.end.output_axis for name, masked in self.masks.items() if masked.end.output_axis}


def sparsity_records(model: nn.Module) -> list[tuple[str, nn.Module, SparsityRecord]]:
    """The (name, module, record) of every module in `model` that was handed to `sparsify`."""
    return [
        (name, module, module.__dict__["_openwork_record"])
        for name, module in model.named_modules()
        if "_openwork_record" in module.__dict__
    ]


def weights_of(model: nn.Module, records: Collection[SparsityRecord]) -> list[SparseWeight]:
    """The masked weights in `model` that one of these records answers for: the innermost one around each."""
    mine = {id(record) for record in records}
    around: list[tuple[str, bool]] = []
    found: list[SparseWeight] = []
    for name, module in model.named_modules():
        while around and not f"{name}.".startswith(around[-1][0]):
            around.pop()
        if (record := module.__dict__.get("_openwork_record")) is not None:
            around.append((f"{name}." if name else "", id(record) in mine))
        if around and around[-1][1] and "_openwork" in module.__dict__:
            found += sparse_weights_of(plain_name(name), module)
    return found


def recorded_weights(model: nn.Module) -> dict[str, tuple[Pattern, Axis]]:
    """The (pattern, axis) that was recorded of each weight by its name in the plain model; none of methods that keep
    every weight in the end."""
    return {
        join(plain_name(prefix), name): placed
        for prefix, _, record in sparsity_records(model)
        if record.method.ends_sparse
        for name, placed in record.weights.items()
    }


def recorded_output_axes(model: nn.Module) -> dict[str, Axis]:
    """The output axes of the weights that are N:M along them as well, by name."""
    return {
        join(plain_name(prefix), name): axis
        for prefix, _, record in sparsity_records(model)
        if record.method.ends_sparse
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
