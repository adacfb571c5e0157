"""The hooks of one optimizer, shared by all handles attached to it, and the gradients that it steps with.

What a method adds to a gradient is for the optimizer alone, as torch's own weight decay is: during a step each weight
has another tensor for its gradient, which the optimizer reads, and after it `weight.grad` is the very tensor that it
was, untouched, also where the step raises. A closure gets the gradients as it left them. Optimizers that unscale
gradients themselves leave them unscaled, like those of the other weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.methods.method import State
from openwork.training.foreach import add_decay, added_decay, decay_weights, decayed_copy
from openwork.training.masked import Masked
from openwork.training.optimizer_checks import check_fitting_state, creates_state_only
from openwork.training.parametrize import SparseWeight


@dataclass
class Stepped:
    """A weight as the hooks of a method see it (`openwork.methods.method.TrainedWeight`)."""

    masked: Masked
    weight: Tensor

    @property
    def state(self) -> State:
        return self.masked.state

    @property
    def step(self) -> int:
        return self.masked.step

    @step.setter
    def step(self, step: int) -> None:
        self.masked.go_to(step)

    def mask(self) -> Tensor:
        return self.masked.mask_of(self.weight)


class Attached(Protocol):
    """What is told of the steps: a handle."""

    @property
    def finished(self) -> bool:
        """Whether it will never again have anything to do or to say."""

    def begin_step(self, optimizer: Optimizer) -> bool:
        """Whether it takes part in the step that begins."""

    def trained(self, optimizer: Optimizer) -> list[SparseWeight]:
        """The weights that it serves now."""

    def end_step(self, optimizer: Optimizer, trained: list[SparseWeight]) -> None: ...


class Hooks:
    """What `attach` puts on an optimizer, once. `handles` is replaced and never changed, so that it may be replaced
    while a step goes through it; torch's own dicts of hooks are not touched during a step."""

    def __init__(self, optimizer: Optimizer):
        self.handles: tuple[Attached, ...] = ()
        self._optimizer, self._before = ref(optimizer), optimizer.__dict__.get("step")  # no circle: it is freed at once
        self._step = optimizer.__dict__["step"] = _restoring(optimizer)
        self._removable = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(check_fitting_state),
        ]
        self._gradients = LentGradients()
        self._taking_part: list[Attached] = []
        self._trained: list[list[SparseWeight]] = []
        self._running = self._decayed = False

    @staticmethod
    def of(optimizer: Optimizer) -> Hooks:
        """Those of the optimizer, put on it where it has none."""
        if "_openwork_hooks" not in optimizer.__dict__:
            optimizer.__dict__["_openwork_hooks"] = Hooks(optimizer)
        hooks: Hooks = optimizer.__dict__["_openwork_hooks"]
        return hooks

    def add(self, handle: Attached) -> None:
        self.handles = (*(each for each in self.handles if not each.finished), handle)

    def drop(self, handle: Attached) -> None:
        """Forget a handle; with the last one the hooks go, but not during a step."""
        self.handles = tuple(each for each in self.handles if each is not handle)
        optimizer = self._optimizer()
        if self.handles or self._running or optimizer is None or optimizer.__dict__.get("_openwork_hooks") is not self:
            return
        for hook in self._removable:
            hook.remove()
        del optimizer.__dict__["_openwork_hooks"]
        if optimizer.__dict__["step"] is self._step:  # else a scheduler stands around it
            del optimizer.__dict__["step"]
            optimizer.__dict__ |= {"step": self._before} if self._before else {}

    def abandon(self) -> None:
        """The step has raised."""
        self._gradients.give_back()
        self._running = False

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.abandon()  # where a step raised that was called around `optimizer.step`
        self._running, self._decayed = True, False
        self._taking_part = [each for each in self.handles if each.begin_step(optimizer)]
        self._trained = [[] for _ in self._taking_part]
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_terms(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self._with_terms(optimizer, args[1]), *args[2:]), kwargs
        if creates_state_only(optimizer):
            self._taking_part = []
        if self._taking_part:
            self._add_terms(optimizer)
        return None

    def _with_terms(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        def closure_with_terms(*args: Any, **kwargs: Any) -> Any:
            self._gradients.give_back()
            loss = closure(*args, **kwargs)
            self._add_terms(optimizer)
            return loss

        return closure_with_terms

    @torch.no_grad()
    def _add_terms(self, optimizer: Optimizer) -> None:
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self._trained = [each.trained(optimizer) for each in self._taking_part]
        weights = [sparse for trained in self._trained for sparse in trained]
        if not self._decayed:
            self._decayed = True
            _decay_decoupled(optimizer, weights)
        signs = _signs(optimizer)
        rest = []
        for sparse in filter(_gets_term, weights):
            rate = signs.get(id(sparse.weight), 1) * added_decay(sparse)
            copy = decayed_copy(sparse, rate) if rate and scale is None else None
            if copy is None:
                rest.append(sparse)
            else:
                self._gradients.lend(sparse.weight, copy)
        for sparse in rest:
            self._gradients.lend(sparse.weight)
        add_decay(rest, [signs.get(id(sparse.weight), 1) for sparse in rest], scale)
        call_hooks("before_step", optimizer, weights)
        self._gradients.seal()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._gradients.give_back(_unscaled_by(optimizer))
        self._running = False
        taking_part, self._taking_part = self._taking_part, []
        trained, self._trained = self._trained, []
        for handle, weights in zip(taking_part, trained, strict=False):
            handle.end_step(optimizer, weights)


class LentGradients:
    """Gradients that an optimizer steps with in place of the weights' own."""

    def __init__(self) -> None:
        self._lent: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        self._versions: list[int | None] = []  # of the copies, when the optimizer got them

    def lend(self, weight: nn.Parameter, lent: Tensor | None = None) -> None:
        """Put another gradient in the place of the weight's, or a copy to write to. What a graph made stays part of
        it."""
        own: Any = weight.grad
        with torch.set_grad_enabled(own.requires_grad):
            lent = own.clone() if lent is None else lent
        self._lent.append((weight, own, lent))
        weight.grad = lent

    def seal(self) -> None:
        """The copies are as the optimizer gets them. A hook may have put another one in the place of one, or None."""
        self._lent = [(weight, own, weight.grad) for weight, own, _ in self._lent]
        self._versions = [None if copy is None else _version(copy) for *_, copy in self._lent]

    def give_back(self, divisor: Tensor | None = None) -> None:
        """Put the own gradients in their places again, where the copies still are: a closure or an optimizer may have
        put others there; zeros, where it has written such (`zero_grad(set_to_none=False)` at the end of a step).
        `divisor`: what the optimizer has divided the copies by."""
        lent, self._lent = self._lent, []
        versions, self._versions = self._versions, []
        for (weight, own, copy), version in zip(lent, versions or [None] * len(lent), strict=True):
            if weight.grad is copy:
                if copy is not None and version is not None and version != _version(copy) and not copy.any():
                    own.detach().zero_()
                if divisor is not None:
                    own.div_(divisor.to(own.device))
                weight.grad = own


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _restoring(optimizer: Optimizer) -> Callable[..., Any]:
    """`optimizer.step`, to stand in its place: torch calls no hook where a step raises."""
    before = optimizer.__dict__.get("step")  # where learning rate schedulers put theirs
    weak = ref(optimizer)

    def run(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return before(*args, **kwargs) if before else type(optimizer).step(optimizer, *args, **kwargs)
        except BaseException:
            if hooks := optimizer.__dict__.get("_openwork_hooks"):
                hooks.abandon()
            raise

    @functools.wraps(before or type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        return run(weak(), *args, **kwargs)  # type: ignore[arg-type]

    step.__func__ = run  # type: ignore[attr-defined]  # which schedulers take of what they take for a method
    return step


def call_hooks(name: str, optimizer: Optimizer, trained: Sequence[SparseWeight]) -> None:
    """Call the hook of each method that has one, with the weights that it trains."""
    methods = {id(each.masked.method): each.masked.method for each in trained if each.masked.method.overrides(name)}
    for method in methods.values():
        own = [Stepped(each.masked, each.weight) for each in trained if each.masked.method is method]
        getattr(method, name)(optimizer, own)


def _gets_term(sparse: SparseWeight) -> bool:
    """Whether something will be added to the gradient of a weight."""
    method = sparse.masked.method
    return sparse.weight.grad is not None and (bool(added_decay(sparse)) or method.overrides("before_step"))


def _decay_decoupled(optimizer: Optimizer, weights: Sequence[SparseWeight]) -> None:
    """What AdamW does with weight decay, where the mask prunes: before the update, once in a step, and not in one that
    is skipped for overflow. Weights without a gradient are left alone, as they are by optimizers."""
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"] if "lr" in group}
    methods = [(sparse, sparse.masked.method) for sparse in weights if sparse.weight.grad is not None]
    decayed = [sparse for sparse, method in methods if method.decoupled and method.decay]
    if decayed:
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        decay_weights(decayed, [rates[id(sparse.weight)] for sparse in decayed], overflow)


def _signs(optimizer: Optimizer) -> dict[int, int]:
    """-1 for what the optimizer turns the gradient of round, because it maximizes: the decay shall shrink it all the
    same."""
    default = getattr(optimizer, "maximize", False)
    ascending = [group for group in optimizer.param_groups if group.get("maximize", default)]
    return {id(p): -1 for group in ascending for p in group["params"]}


def _unscaled_by(optimizer: Optimizer) -> Tensor | None:
    """What a fused optimizer of torch's has divided its gradients by, in place; it does not where it skips a step."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None or not any(group.get("fused") for group in optimizer.param_groups):
        return None
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    return scale if overflow is None else torch.where(overflow.to(scale.device) > 0, 1.0, scale)
