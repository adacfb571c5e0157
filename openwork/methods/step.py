"""STEP: learn Adam's second moment from dense training, then freeze it and train sparse (Lu et al., ICML 2023,
arXiv:2302.01172; details of the implementation in huyz2023/2by4-pretrain, as the authors' is not public).

    dense          Adam as it is; Z_t = mean |v_t - v_(t-1)| over all weights that will be sparse
    change         after the first step t > T_min where the mean of the last T_w values of Z is below Adam's eps; there
                   have to be T_w of them. After T_max steps at the latest
    sparse         v* = v_t, frozen; w~ = w where kept, else +0; gradient of the loss at w~ flows to all of w; no decay
                   m = b1 * m + (1 - b1) * g
                   w = w - lr * (m / (1 - b1^t)) / (sqrt(v*) + eps^0.75)

Weight decay is the optimizer's own. Weights without a mask have Adam as it is, all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from openwork.methods.method import Method, State, TrainedWeight
from openwork.methods.schedule import Phase, Schedule
from openwork.methods.schedules import DenseWarmup


@dataclass(frozen=True)
class STEP(Method):
    """Dense until Adam's second moment has settled, `steps` optimizer steps at the latest, then STE with that moment.
    For `torch.optim.Adam` and `AdamW`. Source: Lu et al., ICML 2023, arXiv:2302.01172.

    `earliest`: T_min, no change until then (0: a fifth of `steps`; T_min and T_max are 10 % and 50 % of a run).
    `window`: T_w, how many steps have to have settled on average; 1 / (1 - beta2), so 20 for a beta2 of 0.95. A change
    early in the warm-up of the learning rate, when moments are tiny, makes for steps that are too long.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "2:4", ow.STEP(100))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'pattern 4:4: not yet 2:4 (step 0 of 100)'
    """

    steps: int
    earliest: int = 0
    window: int = 1000

    name: ClassVar[str] = "step"
    shared_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()  # asks for the schedule, which checks the steps
        for name, number, least in (("earliest", self.earliest, 0), ("window", self.window, 1)):
            if type(number) is not int or number < least:
                raise ValueError(f"{name}={number!r}; needed a number of optimizer steps, {least} or more")

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return DenseWarmup(self.steps)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        if not isinstance(optimizer, Adam | AdamW) or any(group["amsgrad"] for group in groups):
            what = f"{type(optimizer).__name__}{' with amsgrad' if isinstance(optimizer, Adam | AdamW) else ''}"
            raise ValueError(f"{self} with {what}; needed torch.optim.Adam or AdamW, whose second moment it freezes")

    def state(self, weight: Tensor, phase: Phase) -> State:
        return {"change": torch.zeros(self.window, device=weight.device)}  # of v, in each of the last steps

    def before_step(self, optimizer: Optimizer, weights: Sequence[TrainedWeight]) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for each in weights:
            if each.weight.grad is None:
                continue
            group = groups[id(each.weight)]
            gradient = _gradient(optimizer, group, each.weight)
            if each.step < self.steps:
                v = optimizer.state.get(each.weight, {}).get("exp_avg_sq", torch.zeros_like(gradient))
                total = ((gradient.square() - v).abs() * (1 - group["betas"][1])).sum()
                total = total.full_tensor() if hasattr(total, "full_tensor") else total
                each.state["change"][each.step % self.window] = total / gradient.numel()
            else:
                _step(optimizer, group, each.weight, gradient)
                each.weight.grad = None  # the optimizer has nothing to do here

    def after_step(self, optimizer: Optimizer, weights: Sequence[TrainedWeight]) -> None:
        least = max(self.window, 1 + (self.earliest or self.steps // 5))
        dense = [each for each in weights if least <= each.step < self.steps]
        if not dense:
            return
        sizes = [each.weight.numel() / sum(other.weight.numel() for other in dense) for each in dense]
        settled = sum(each.state["change"].mean() * size for each, size in zip(dense, sizes, strict=True))
        if bool(settled < min(group["eps"] for group in optimizer.param_groups)):
            for each in dense:
                each.step = self.steps


def _gradient(optimizer: Optimizer, group: dict[str, Any], weight: Tensor) -> Tensor:
    """What Adam takes its moments of."""
    gradient: Any = weight.grad
    if (scale := getattr(optimizer, "grad_scale", None)) is not None:
        gradient = gradient / scale.to(gradient.device)
    gradient = -gradient if group["maximize"] else gradient
    if group["weight_decay"] and not _is_decoupled(optimizer, group):
        gradient = gradient + group["weight_decay"] * weight
    return gradient


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def _step(optimizer: Optimizer, group: dict[str, Any], weight: Tensor, gradient: Tensor) -> None:
    """Adam with the second moment as it is, in place; nothing where the step is skipped for overflow."""
    state = optimizer.state.get(weight, {})
    if "exp_avg_sq" not in state:
        raise RuntimeError(
            "STEP trains sparse with the second moment of the dense steps, and the optimizer has none: load its state "
            "along with that of the model"
        )
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    g, w, m, v = map(_local, (gradient, weight.detach(), state["exp_avg"], state["exp_avg_sq"]))
    counted = state["step"] + 1
    first = torch.lerp(m, g, 1 - group["betas"][0])
    done = float(counted) if counted.device.type == "cpu" else counted
    moved = first / (1 - group["betas"][0] ** done) / (v.sqrt() + group["eps"] ** 0.75)
    kept = 1 - group["lr"] * group["weight_decay"] if _is_decoupled(optimizer, group) else 1.0
    for old, new in ((m, first), (w, w * kept - group["lr"] * moved), (state["step"], counted)):
        old.copy_(new if overflow is None else torch.where(overflow.to(old.device) > 0, old, new))


def _local(tensor: Any) -> Tensor:
    """The part of this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
