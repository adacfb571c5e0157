"""Run a method's part of training inside `optimizer.step()`: decay, schedule, hooks, topology.

The decay of pruned weights is added to the gradient once per step, outside autograd, after whatever the loop did to the
gradients: unscaling, reducing, accumulating, clipping. Four cases need care, each tested:

- `step(closure)`: the gradients do not exist before the closure ran, so the closure is wrapped;
- a fused optimizer under GradScaler receives scaled gradients and unscales them itself: the decay is scaled as well;
- a step skipped for overflow counts nothing;
- distributed checkpointing runs a step with zero gradients and learning rate 0 to create the optimizer state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.training.dtensor import full_tensor, is_sharded
from openwork.training.foreach import decay_gradients
from openwork.training.masked import Stepped
from openwork.training.optimizer_checks import check_fitting_state, check_supported, creates_state_only, unwrapped
from openwork.training.parametrize import SparseWeight, masked_modules, trained_weights, unwrap
from openwork.training.record import sparsity_records, unfinished_weights
from openwork.training.sparsify import masks
from openwork.training.topology import Topology


class Handle:
    """What `attach` returns. `steps` counts optimizer steps that were not skipped. To ask a GPU whether one was is to
    wait for it, so that is put off until somebody wants to know."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, topology: Topology | None):
        self._steps = 0
        self._skipped: Tensor | None = None  # of these, on the optimizer's device
        self.topology = topology
        self._optimizer, self._model = ref(optimizer), model  # the optimizer's hooks hold the handle: no circle
        self._before: dict[str, Tensor] = {}
        self._warned = False
        methods = [record.method for _, _, record in sparsity_records(model)]
        self._counts = any(method.schedule.counts_steps or method.overrides("after_step") for method in methods)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(check_fitting_state),
        ]
        if topology and not topology.snapshots:
            topology.begin(_full_masks(model))

    @property
    def steps(self) -> int:
        if self._skipped is not None:
            self._steps, self._skipped = self._steps - int(self._skipped), None
        return self._steps

    @property
    def unfinished(self) -> str:
        """What the weights are while the method's schedule runs: "mask decay beta = 0.31: not yet 2:4 (step 690 of
        1000)". Empty once it has ended, and where there is none."""
        return "; ".join(dict.fromkeys(unfinished_weights(self._model).values()))

    def detach(self) -> None:
        """Remove every hook from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            for _, _, record in sparsity_records(self._model):
                record.watch.attached[optimizer] = False

    def state_dict(self) -> dict[str, Any]:
        """Counters and topology, for an exact resume."""
        return {"steps": self.steps, "topology": self.topology.state_dict() if self.topology else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._skipped = state["steps"], None
        if self.topology and state["topology"]:
            self.topology.load_state_dict(state["topology"])

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._warn_if_finalized()
        self._before = _full_masks(self._model) if self.topology and self.topology.due(self.steps + 1) else {}
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_decay(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self._with_decay(optimizer, args[1]), *args[2:]), kwargs
        self._add_decay(optimizer)
        return None

    def _with_decay(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        def closure_with_decay(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._add_decay(optimizer)
            return loss

        return closure_with_decay

    @torch.no_grad()
    def _add_decay(self, optimizer: Optimizer) -> None:
        if creates_state_only(optimizer):
            return
        scale = getattr(optimizer, "grad_scale", None)
        trained = trained_weights(optimizer, self._model)
        if not trained and any(masked_modules(self._model)):
            raise RuntimeError(
                f"this {type(optimizer).__name__} held sparse weights of {type(self._model).__name__} when it was "
                "attached and holds none now: something replaced them in the model (fully_shard, which must come "
                "before the optimizer is built) or in the optimizer (DeepSpeed ZeRO, which is not supported)"
            )
        decay_gradients(trained, scale)
        _call_hooks("before_step", optimizer, trained)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if creates_state_only(optimizer):
            return
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        if overflow is not None and (self._counts or self.topology):
            if bool(overflow):
                return
        elif overflow is not None:
            skipped = (overflow > 0).long()
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        self._steps += 1
        if self._counts:
            trained = trained_weights(optimizer, self._model)
            for sparse in trained:
                sparse.masked.count_step(sparse.weight)
            _call_hooks("after_step", optimizer, trained)
        if self._before and self.topology:
            self.topology.record(self.steps, self._before, _full_masks(self._model))

    def _warn_if_finalized(self) -> None:
        if not self._warned and not any(masked_modules(self._model)):
            self._warned = True
            warnings.warn(
                "the model was finalized, but its optimizer still steps: its weights become dense again; "
                "call handle.detach() if that is meant, or train before ow.finalize",
                stacklevel=4,
            )


def attach(optimizer: Optimizer, model: nn.Module, *, topology: Topology | None = None) -> Handle:
    """Let `optimizer.step()` do the method's part for the weights of `model` that the optimizer holds.

    Call it after `sparsify` and once per optimizer; the training loop stays as it is. `model` may be wrapped in DDP or
    compiled, `optimizer` may be wrapped by Accelerate. Raises ValueError when the model is not sparsified, the
    optimizer holds none of its sparse weights, is attached already, or is LBFGS with a line search (which evaluates
    losses that lack the decay).
    """
    model, optimizer = unwrap(model), unwrapped(optimizer)
    records = sparsity_records(model)
    if not records and any(masked_modules(model)):
        raise ValueError(
            f"{type(model).__name__} is only part of a sparsified model: hand ow.attach the model that ow.sparsify got"
        )
    if not records:
        raise ValueError(
            f"{type(model).__name__} is not sparsified: call ow.sparsify(model, pattern) before ow.attach; "
            "to resume a sparse run, sparsify first and then load the checkpoint"
        )
    if any(record.watch.attached.get(optimizer) for _, _, record in records):
        raise ValueError(f"this {type(optimizer).__name__} is attached already: the decay would be added twice")
    trained = trained_weights(optimizer, model)
    if not trained:
        raise ValueError(
            f"this {type(optimizer).__name__} holds none of the sparse weights of {type(model).__name__}; "
            "build it from model.parameters() of this very model"
        )
    check_supported(optimizer)
    for sparse in trained:
        if is_sharded(sparse.weight) and sparse.masked.state_names:
            raise ValueError(
                f"{sparse.name} is sharded, and {sparse.masked.method} keeps {', '.join(sparse.masked.state_names)} "
                "for each weight, which is not spread with it: train without fully_shard, or with another method"
            )
        sparse.masked.reuses_mask = sparse.masked.reuses_mask and not is_sharded(sparse.weight)
    for _, _, record in records:
        record.watch.attached[optimizer], record.cache.copied = True, False
    return Handle(optimizer, model, topology)


def _full_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks, gathered where they are spread over processes: one byte a weight travels, in recorded steps only."""
    return {name: full_tensor(mask) for name, mask in masks(model).items()}


def _call_hooks(name: str, optimizer: Optimizer, trained: list[SparseWeight]) -> None:
    """Call the hook of each method that has one, with the weights that it trains."""
    methods = {id(each.masked.method): each.masked.method for each in trained if each.masked.method.overrides(name)}
    for method in methods.values():
        own = [Stepped(each.masked, each.weight) for each in trained if each.masked.method is method]
        getattr(method, name)(optimizer, own)
