"""What `attach` refuses, and why; and which steps of an optimizer are none."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer


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


def check_fitting_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse a saved state that fits the parameters in another order: sparsify changes their order.

    Tensors of other shapes (LBFGS flattens, Adafactor factors, 8-bit optimizers cut into blocks) are left to torch.
    """
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    saved = [state["state"].get(index, {}) for group in state["param_groups"] for index in group["params"]]
    for key in {key: None for values in saved for key in values}:
        tensors = {i: values[key] for i, values in enumerate(saved) if isinstance(values.get(key), Tensor)}
        stored = {i: tuple(tensor.shape) for i, tensor in tensors.items() if tensor.ndim and i < len(shapes)}
        wrong = [i for i, shape in stored.items() if shape != shapes[i]]
        if wrong and Counter(stored.values()) <= Counter(shapes):
            raise ValueError(
                f"optimizer state {key!r} of parameter {wrong[0]} has shape {stored[wrong[0]]}, the parameter "
                f"{shapes[wrong[0]]}: build the optimizer after ow.sparsify, in the run that saves and in "
                "the run that loads (sparsify changes the order of the parameters)"
            )
