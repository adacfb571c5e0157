"""What `sparsify` leaves on a model: the pattern of each weight, and a watch that training keeps to it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref
from weakref import finalize as finalize_with

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from openwork.methods import Method
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.training.forward_cache import ForwardCache
from openwork.training.parametrize import masked_modules, plain_name, trained_weights
from openwork.utils.names import join


@dataclass
class SparsityRecord:
    """What `sparsify` leaves on the model's root: the pattern and axis of each weight, and who trains it.
    `output_axes`: those of weights that are N:M along them as well."""

    weights: dict[str, tuple[Pattern, Axis]]
    method: Method
    cache: ForwardCache
    hooks: tuple[Any, ...] = ()
    optimizers: WeakKeyDictionary[torch.optim.Optimizer, bool] = field(default_factory=WeakKeyDictionary)
    """False once detached."""
    watch: finalize_with | None = None
    output_axes: dict[str, Axis] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are trained by other optimizers, and watched like the original."""
        watched = self.watch.peek() if self.watch else None
        return (
            _copied_record,
            (self.weights, self.method, self.cache, self.hooks, self.output_axes),
            watched and watched[0],
        )

    def __setstate__(self, model: nn.Module) -> None:
        self.watch = watch_optimizers(model)


def _copied_record(
    weights: Any, method: Method, cache: ForwardCache, hooks: Any, output_axes: dict[str, Axis]
) -> SparsityRecord:
    return SparsityRecord(weights, method, cache, hooks, output_axes=output_axes)


def sparsity_records(model: nn.Module) -> list[tuple[str, nn.Module, SparsityRecord]]:
    """The (name, module, record) of every module in `model` that was handed to `sparsify`."""
    found = [(name, each) for name, each in model.named_modules() if "_openwork_record" in each.__dict__]
    return [(name, each, each.__dict__["_openwork_record"]) for name, each in found]


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


def watch_optimizers(model: nn.Module) -> finalize_with:
    """Warn at the first step of an optimizer that trains the model but was never attached.

    Returns what ends the watch when called; the end of the model's life ends it too.
    """
    groups_seen: WeakKeyDictionary[torch.optim.Optimizer, float] = WeakKeyDictionary()
    model_ref = ref(model)

    def before_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        model = model_ref()
        record = model.__dict__.get("_openwork_record") if model is not None else None
        groups = len(optimizer.param_groups)
        if model is None or record is None or groups_seen.get(optimizer, -1) >= groups:
            return
        groups_seen[optimizer] = groups
        if any("base_layer" in name.split(".") for name, _ in masked_modules(model)):
            groups_seen[optimizer] = math.inf
            warnings.warn(
                "LoRA sits on a model that is still sparsified: what it learns is lost when it is merged, because the "
                "weight that it is added to is computed anew; call ow.finalize(model) before adding adapters",
                stacklevel=3,
            )
        if trained_weights(optimizer, model) and not any(_same(optimizer, known) for known in record.optimizers):
            groups_seen[optimizer] = math.inf
            warnings.warn(
                f"{type(optimizer).__name__} steps a model sparsified with {record.method}, but nobody attached it: "
                "the gradient term is missing; call ow.attach(optimizer, model) before training",
                stacklevel=3,
            )

    watch = finalize_with(model, register_optimizer_step_pre_hook(before_any_step).remove)
    watch.atexit = False
    return watch


def _same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether they are one optimizer, or one wraps the other, as ZeroRedundancyOptimizer and Lookahead do."""
    return a is b or any(each is a for each in vars(b).values()) or any(each is b for each in vars(a).values())
