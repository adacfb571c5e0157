"""Which optimizers train a sparsified model, and what is said where one does that was never attached.

torch has one dict of hooks for all optimizers of a process, which must not change while a step goes through it: ours
is registered when openwork is imported, and for good. What it looks at is a tuple that is replaced, never changed, so
that models may come and go, also by the garbage collector, in the middle of anybody's step.
"""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from openwork.methods import Method
from openwork.training.masked import Masked
from openwork.training.optimizer_checks import check_own_state, replaced
from openwork.training.parametrize import masked_modules, sparse_weights, trained_weights
from openwork.utils.caller import outside

_watches: tuple[ref[OptimizerWatch], ...] = ()
_changing = threading.Lock()


class OptimizerWatch:
    """Looks at each optimizer that trains the model, at its first step: warns where the method needs it to be attached
    and it never was; raises ValueError where its state belongs to other weights, and RuntimeError where its weights
    are no longer the model's.

    `attached`: the optimizers that were; False once detached. The watch ends with the model's life, or by `end`. A copy
    of the model is trained by other optimizers: with the model, the watch is copied without them.
    """

    def __init__(self, model: nn.Module, method: Method):
        self._start(model, method)

    def _start(self, model: nn.Module, method: Method) -> None:
        self.attached: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._groups_seen: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
        self._model: ref[nn.Module] | None = ref(model)
        self._method, self._assignments = method, Masked.assignments
        _add(self)

    def end(self) -> None:
        self._model = None

    def __getstate__(self) -> tuple[nn.Module | None, Method]:
        return self._model() if self._model else None, self._method

    def __setstate__(self, state: tuple[nn.Module, Method]) -> None:
        self._start(*state)

    def before_step(self, optimizer: Optimizer) -> None:
        model, groups = self._model() if self._model else None, len(optimizer.param_groups)
        if model is None:
            return
        if self._assignments != Masked.assignments:
            self._check_replaced(optimizer, model)
        if self._groups_seen.get(optimizer, -1) < groups:
            self._groups_seen[optimizer] = groups
            self._first_step(optimizer, model)

    def _first_step(self, optimizer: Optimizer, model: nn.Module) -> None:
        if any("base_layer" in name.split(".") for name, _ in masked_modules(model)):
            self._groups_seen[optimizer] = math.inf
            warnings.warn(
                "LoRA sits on a model that is still sparsified: what it learns is pruned when it is merged, because it "
                "is added to the dense weight, whose mask is chosen anew; call ow.finalize(model) before adding "
                "adapters",
                stacklevel=outside(),
            )
        if not trained_weights(optimizer, model) or any(same_or_around(optimizer, known) for known in self.attached):
            return
        check_own_state(optimizer)
        if self._method.acts_in_step:
            self._groups_seen[optimizer] = math.inf
            warnings.warn(
                f"{type(optimizer).__name__} steps a model sparsified with {self._method}, but nobody attached it: "
                f"{_missing(self._method)}; call ow.attach(optimizer, model) before training",
                stacklevel=outside(),
            )

    def _check_replaced(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Somewhere `load_state_dict(assign=True)` has put other parameters into masked modules."""
        before = {
            each.name: old
            for each in sparse_weights(model)
            if each.masked.replaced and (old := each.masked.replaced()) is not None
        }
        if names := replaced(optimizer, before, {each.name: each.weight for each in sparse_weights(model)}):
            raise RuntimeError(no_longer_held(optimizer, model, names))
        if not before:
            self._assignments = Masked.assignments


def same_or_around(a: Optimizer, b: Optimizer) -> bool:
    """Whether they are one optimizer, or one wraps the other, as ZeroRedundancyOptimizer and Lookahead do."""
    return a is b or any(each is a for each in vars(b).values()) or any(each is b for each in vars(a).values())


def no_longer_held(optimizer: Optimizer, model: nn.Module, names: list[str]) -> str:
    """What is said of an optimizer that holds what weights were before something replaced them."""
    return (
        f"{', '.join(names[:3])} of {type(model).__name__} {'are' if len(names) > 1 else 'is'} no longer what this "
        f"{type(optimizer).__name__} holds: something put other parameters into the model after the optimizer was "
        "built, such as load_state_dict(assign=True) or fully_shard, and nothing would train them; do that first, or "
        "build the optimizer anew and attach it"
    )


def _add(watch: OptimizerWatch) -> None:
    global _watches
    with _changing:
        _watches = (*(each for each in _watches if each() is not None), ref(watch))


def _before_any_step(optimizer: Optimizer, *_: Any) -> None:
    if _watches and not torch.compiler.is_compiling():
        for each in _watches:
            if (watch := each()) is not None:
                watch.before_step(optimizer)


register_optimizer_step_pre_hook(_before_any_step)


def _missing(method: Method) -> str:
    """What the method does in an optimizer step."""
    return "the decay of pruned weights is missing" if method.decay else "the method's schedule stands still"
