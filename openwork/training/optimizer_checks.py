"""What `attach` refuses, and why; and which steps of an optimizer are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from openwork.methods import Method
from openwork.training.parametrize import weight_name


def check_supported(optimizer: Optimizer) -> None:
    """Raise ValueError for optimizers in whose step nothing can be added to the gradient."""
    if hasattr(optimizer, "first_step") and isinstance(getattr(optimizer, "base_optimizer", None), Optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} takes its gradient away from the weights, and base_optimizer steps: call "
            "ow.attach(optimizer.base_optimizer, model), where the weights are back"
        )
    if isinstance(optimizer, LBFGS) and any(group["line_search_fn"] for group in optimizer.param_groups):
        raise ValueError(
            "LBFGS with a line search evaluates losses that lack the method's decay; use line_search_fn=None"
        )


def check_methods(optimizer: Optimizer, methods: Sequence[Method]) -> None:
    """Raise ValueError where a method cannot go with the optimizer, or its decoupled decay has no learning rate."""
    for method in {id(each): each for each in methods}.values():
        method.check_optimizer(optimizer)
    decoupled = [method for method in methods if method.decoupled and method.decay]
    if decoupled and not all("lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has parameter groups without 'lr', which the decoupled decay of "
            f"{decoupled[0]} is multiplied with: use decoupled=False"
        )


def creates_state_only(optimizer: Optimizer) -> bool:
    """Whether this is torch.distributed.checkpoint's step that only creates optimizer state: every learning rate is 0
    and every gradient zero."""
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any((isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0.0 for rate in rates):
        return False  # what it sets is a number or a CPU tensor; asking a GPU would wait for it
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def unwrapped(optimizer: Any) -> Optimizer:
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


def replaced(optimizer: Optimizer, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """The names of weights of which the optimizer holds what they were before, and not what they are now."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, old in before.items() if id(old) in held and name in now and id(now[name]) not in held]


def check_own_state(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state was loaded from one that had the parameters in another order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _check_shapes([tuple(p.shape) for p in parameters], [optimizer.state.get(p, {}) for p in parameters])


def check_fitting_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse a saved state that fits the parameters in another order: sparsify changes their order."""
    for group, saved_group in zip(optimizer.param_groups, state["param_groups"], strict=False):
        _check_names(group.get("param_names", ()), saved_group.get("param_names", ()))
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    saved = [state["state"].get(index, {}) for group in state["param_groups"] for index in group["params"]]
    _check_shapes(shapes, saved)


def _check_names(names: Sequence[str], saved: Sequence[str]) -> None:
    """Where both optimizers were built from named parameters, the names tell, whatever the shapes."""
    pairs = [(weight_name(name), weight_name(other)) for name, other in zip(names, saved, strict=False)]
    wrong = next(((name, other) for name, other in pairs if name != other), None)
    if wrong and Counter(name for name, _ in pairs) == Counter(other for _, other in pairs):
        raise ValueError(f"the optimizer state of {wrong[1]} stands where {wrong[0]} does: {_REMEDY}")


def _check_shapes(shapes: Sequence[tuple[int, ...]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Tensors of other shapes (LBFGS flattens, Adafactor factors, 8-bit optimizers cut into blocks) are left to
    torch."""
    for key in {key: None for values in saved for key in values}:
        tensors = {i: values[key] for i, values in enumerate(saved) if isinstance(values.get(key), Tensor)}
        stored = {i: tuple(tensor.shape) for i, tensor in tensors.items() if tensor.ndim and i < len(shapes)}
        wrong = [i for i, shape in stored.items() if shape != shapes[i]]
        if wrong and Counter(stored.values()) <= Counter(shapes):
            raise ValueError(
                f"optimizer state {key!r} of parameter {wrong[0]} has shape {stored[wrong[0]]}, the parameter "
                f"{shapes[wrong[0]]}: {_REMEDY}"
            )


_REMEDY = (
    "build the optimizer after ow.sparsify, in the run that saves and in the run that loads (sparsify changes the "
    "order of the parameters); to go on with the state of a dense run, build the optimizer on the dense model, load "
    "both states, and then call ow.sparsify and ow.attach"
)
