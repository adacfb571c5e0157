"""Which optimizers train a sparsified model, and a warning where one does that was never attached."""

from __future__ import annotations

import math
import warnings
from typing import Any
from weakref import WeakKeyDictionary, ref
from weakref import finalize as at_the_end_of

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from openwork.methods import Method
from openwork.training.parametrize import masked_modules, trained_weights


class OptimizerWatch:
    """Warns at the first step of an optimizer that trains the model but was never attached, where the method needs it.

    `attached`: the optimizers that were; False once detached. The watch ends with the model's life, or by `end`. A copy
    of the model is trained by other optimizers: with the model, the watch is copied without them.
    """

    def __init__(self, model: nn.Module, method: Method):
        self._start(model, method)

    def _start(self, model: nn.Module, method: Method) -> None:
        self.attached: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._groups_seen: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
        self._model, self._method = ref(model), method
        self._end = None
        if method.acts_in_step:
            self._end = at_the_end_of(model, register_optimizer_step_pre_hook(self._before_any_step).remove)
            self._end.atexit = False

    def end(self) -> None:
        if self._end:
            self._end()

    def __getstate__(self) -> tuple[nn.Module | None, Method]:
        return self._model(), self._method

    def __setstate__(self, state: tuple[nn.Module, Method]) -> None:
        self._start(*state)

    def _before_any_step(self, optimizer: Optimizer, *_: Any) -> None:
        model, groups = self._model(), len(optimizer.param_groups)
        if model is None or self._groups_seen.get(optimizer, -1) >= groups:
            return
        self._groups_seen[optimizer] = groups
        if any("base_layer" in name.split(".") for name, _ in masked_modules(model)):
            self._groups_seen[optimizer] = math.inf
            warnings.warn(
                "LoRA sits on a model that is still sparsified: what it learns is pruned when it is merged, because it "
                "is added to the dense weight, whose mask is chosen anew; call ow.finalize(model) before adding "
                "adapters",
                stacklevel=3,
            )
        if trained_weights(optimizer, model) and not any(_same(optimizer, known) for known in self.attached):
            self._groups_seen[optimizer] = math.inf
            warnings.warn(
                f"{type(optimizer).__name__} steps a model sparsified with {self._method}, but nobody attached it: "
                f"{_missing(self._method)}; call ow.attach(optimizer, model) before training",
                stacklevel=3,
            )


def _missing(method: Method) -> str:
    """What the method does in an optimizer step."""
    return "the decay of pruned weights is missing" if method.decay else "the method's schedule stands still"


def _same(a: Optimizer, b: Optimizer) -> bool:
    """Whether they are one optimizer, or one wraps the other, as ZeroRedundancyOptimizer and Lookahead do."""
    return a is b or any(each is a for each in vars(b).values()) or any(each is b for each in vars(a).values())
