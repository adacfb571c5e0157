"""Run a method's part of training inside `optimizer.step()`: the gradient term, counters, topology.

The term is added once per step, outside autograd, after whatever the loop did to the gradients: unscaling, reducing,
accumulating, clipping. Four cases need care, each tested:

- `step(closure)`: the gradients do not exist before the closure ran, so the closure is wrapped;
- a fused optimizer under GradScaler receives scaled gradients and unscales them itself: the term is scaled as well;
- a step skipped for overflow counts nothing;
- distributed checkpointing runs a step with zero gradients and learning rate 0 to create the optimizer state.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from openwork.methods import steps_of_a_mask
from openwork.training.dtensor import is_sharded, whole
from openwork.training.foreach import add_gradient_terms
from openwork.training.parametrize import masked_modules, trained_weights, unwrap
from openwork.training.record import sparsity_records
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
        self._refreshes = any(steps_of_a_mask(record.method) for _, _, record in sparsity_records(model))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(_check_fitting_state),
        ]
        if topology and not topology.snapshots:
            topology.begin(_whole_masks(model))

    @property
    def steps(self) -> int:
        if self._skipped is not None:
            self._steps, self._skipped = self._steps - int(self._skipped), None
        return self._steps

    def detach(self) -> None:
        """Remove every hook from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            for _, _, record in sparsity_records(self._model):
                record.optimizers[optimizer] = False

    def state_dict(self) -> dict[str, Any]:
        """Counters and topology, for an exact resume."""
        return {"steps": self.steps, "topology": self.topology.state_dict() if self.topology else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._skipped = state["steps"], None
        if self.topology and state["topology"]:
            self.topology.load_state_dict(state["topology"])

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._warn_if_finalized()
        self._before = _whole_masks(self._model) if self.topology and self.topology.due(self.steps + 1) else {}
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_term(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self._with_term(optimizer, args[1]), *args[2:]), kwargs
        self._add_term(optimizer)
        return None

    def _with_term(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        def closure_with_term(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._add_term(optimizer)
            return loss

        return closure_with_term

    @torch.no_grad()
    def _add_term(self, optimizer: Optimizer) -> None:
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
        add_gradient_terms(trained, scale)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if creates_state_only(optimizer):
            return
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        if overflow is not None and (self._refreshes or self.topology):
            if bool(overflow):
                return
        elif overflow is not None:
            skipped = (overflow > 0).long()
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        self._steps += 1
        if self._refreshes:
            for sparse in trained_weights(optimizer, self._model):
                sparse.masked.count_step(sparse.weight)
        if self._before and self.topology:
            self.topology.record(self.steps, self._before, _whole_masks(self._model))

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
    losses that lack the term).
    """
    model, optimizer = unwrap(model), _unwrapped(optimizer)
    found = sparsity_records(model)
    if not found and any(masked_modules(model)):
        raise ValueError(
            f"{type(model).__name__} is only part of a sparsified model: hand ow.attach the model that ow.sparsify got"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} is not sparsified: call ow.sparsify(model, pattern) before ow.attach; "
            "to resume a sparse run, sparsify first and then load the checkpoint"
        )
    if any(record.optimizers.get(optimizer) for _, _, record in found):
        raise ValueError(f"this {type(optimizer).__name__} is attached already: the term would be added twice")
    trained = trained_weights(optimizer, model)
    if not trained:
        raise ValueError(
            f"this {type(optimizer).__name__} holds none of the sparse weights of {type(model).__name__}; "
            "build it from model.parameters() of this very model"
        )
    if hasattr(optimizer, "first_step") and isinstance(getattr(optimizer, "base_optimizer", None), Optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} takes its gradient away from the weights, and base_optimizer steps: call "
            "ow.attach(optimizer.base_optimizer, model), where the weights are back"
        )
    if isinstance(optimizer, LBFGS) and any(group["line_search_fn"] for group in optimizer.param_groups):
        raise ValueError(
            "LBFGS with a line search evaluates losses that lack the method's term; use line_search_fn=None"
        )
    for sparse in trained:
        sparse.masked.reuses_mask = sparse.masked.reuses_mask and not is_sharded(sparse.weight)
    for _, _, record in found:
        record.optimizers[optimizer] = True
    return Handle(optimizer, model, topology)


def _whole_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks, gathered where they are spread over processes: one byte a weight travels, in recorded steps only."""
    return {name: whole(mask) for name, mask in masks(model).items()}


def creates_state_only(optimizer: Optimizer) -> bool:
    """Whether this is torch.distributed.checkpoint's step that only creates optimizer state: every learning rate is 0
    and every gradient zero."""
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any((isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0.0 for rate in rates):
        return False  # what it sets is a number or a CPU tensor; asking a GPU would wait for it
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def _unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's and Lightning's wrappers."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        _refuse_deepspeed(optimizer)
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"found {type(optimizer).__name__} for the optimizer; needed a torch.optim.Optimizer")
    return optimizer


def _refuse_deepspeed(optimizer: Any) -> None:
    """ZeRO keeps flat copies of the weights: neither it nor the optimizer inside it sees one of the model's."""
    if type(optimizer).__module__.startswith("deepspeed."):
        raise TypeError(
            f"DeepSpeed's {type(optimizer).__name__} updates flattened copies of the weights, in which no mask can be "
            'found: use DDP or fully_shard instead, or DeepSpeed with {"zero_optimization": {"stage": 0}}; ow.STE() '
            "and ow.ASP(), which add nothing to the gradient, need no ow.attach"
        )


def _check_fitting_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse a saved state that fits the parameters in another order: sparsify changes their order.

    Tensors of other shapes (LBFGS flattens, Adafactor factors, 8-bit optimizers cut into blocks) are left to torch.
    """
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    saved = [state["state"].get(index, {}) for group in state["param_groups"] for index in group["params"]]
    for key in {key: None for values in saved for key in values}:
        tensors = {i: values[key] for i, values in enumerate(saved) if isinstance(values.get(key), Tensor)}
        found = {i: tuple(tensor.shape) for i, tensor in tensors.items() if tensor.ndim and i < len(shapes)}
        wrong = [i for i, shape in found.items() if shape != shapes[i]]
        if wrong and Counter(found.values()) <= Counter(shapes):
            raise ValueError(
                f"optimizer state {key!r} of parameter {wrong[0]} has shape {found[wrong[0]]}, the parameter "
                f"{shapes[wrong[0]]}: build the optimizer after ow.sparsify, in the run that saves and in "
                "the run that loads (sparsify changes the order of the parameters)"
            )
