"""MaxQ: several queries of how important a weight is (Xiang et al., CVPR 2024, arXiv:2312.07061; defaults and details
of the authors' code).

    m              the N:M mask of the groups; a falling share of them, those with the smallest L1 norm, stays dense
    q_filter       of each output's weights the N/M with the largest magnitudes: sigmoid((|w| - t) / tau), t midway
                   between the two magnitudes around the cut; 0 elsewhere
    q_kernel       the same of all weights at one position of a kernel, where it has several
    forward        w~ = w * m * (1 + q_filter + q_kernel)     gradient of the loss at w~ flows to all of w
    before a step  g  = g + decay * w where m prunes
    finished       w~ of the last step: N:M, and nothing to compute

The authors let the ramp take a quarter of the training (30 of 120 epochs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from openwork.methods.method import Method, State
from openwork.methods.schedule import Phase, Schedule
from openwork.methods.schedules import Ramp
from openwork.nm.pattern import Pattern
from openwork.ops.masks import check_rate


@dataclass(frozen=True)
class MaxQ(Method):
    """SR-STE whose groups become N:M one after the other in `steps` optimizer steps, with kept weights multiplied by 1
    to 3, by their ranks. `curve`: that of `ow.Ramp`. For linear layers and convolutions of two dims or more.
    Source: Xiang et al., CVPR 2024, arXiv:2312.07061.

    The queries look at whole weights: a weight that is spread over processes cannot be read outside of a forward that
    gathers it (FSDP2 does), and not under tensor parallelism.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "1:4", ow.MaxQ(100))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    '100.0% of the groups dense: not yet 1:4 (step 0 of 100)'
    """

    steps: int
    decay: float = 2e-4
    tau: float = 0.01
    curve: str = "linear"

    name: ClassVar[str] = "maxq"
    elementwise: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()  # asks for the schedule, which checks steps and curve
        check_rate("decay", self.decay)
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau}; needed a number greater than 0")

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return Ramp(self.steps, self.curve)

    def state(self, weight: Tensor, phase: Phase) -> State:
        axis = phase.axis
        if weight.ndim == 3 or axis.dim > 1 or axis.blocks > 1 or axis.flat:
            raise ValueError(
                f"{self} knows no filters of a weight {tuple(weight.shape)} with its groups along {axis}: exclude it, "
                "or use ow.SRSTE(schedule=ow.Ramp(steps))"
            )
        return {}

    def forward(self, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        magnitude = weight.abs().movedim(1 - phase.axis.dim, 0)  # (outputs, inputs, positions of a kernel)
        query = self._query(magnitude.flatten(1), phase.pattern).view(magnitude.shape)
        if magnitude.ndim > 2 and magnitude[0, 0].numel() > 1:
            positions = magnitude.flatten(2).permute(2, 0, 1)
            at_each = self._query(positions.flatten(1), phase.pattern).view(positions.shape)
            query = query + at_each.permute(1, 2, 0).reshape(magnitude.shape)
        return torch.where(mask, weight * (1 + query.movedim(0, 1 - phase.axis.dim)), 0.0)

    def _query(self, magnitude: Tensor, pattern: Pattern) -> Tensor:
        """What each weight of a row is raised by; nothing where none is cut off."""
        count = magnitude.shape[-1]
        cut = count * (pattern.m - pattern.n) // pattern.m
        if not cut:
            return torch.zeros_like(magnitude)
        order = magnitude.argsort(dim=-1, descending=True, stable=True)
        top = torch.zeros_like(magnitude).scatter(-1, order[..., : count - cut], 1.0).bool()  # traces take no True here
        around = magnitude.gather(-1, order[..., count - cut - 1 : count - cut + 1]).mean(-1, keepdim=True)
        return torch.where(top, torch.sigmoid((magnitude - around) / self.tau), 0.0)
