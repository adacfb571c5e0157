"""S-STE: STE with a soft threshold instead of a mask, so that w~ changes without jumps (Hu et al., NeurIPS 2024,
arXiv:2409.09099, for 2:4; here for any N:M).

    t              the (M-N)-th smallest magnitude of each group, so the largest that the mask prunes
    S(w)           sign(w) * max(|w| - t, 0)
    beta           <w, S(w)> / <S(w), S(w)> of the whole tensor, from the weights that are sparsified; then frozen
    forward        w~ = beta * S(w)               gradient of the loss at w~ flows to all of w, unscaled
    finished       beta * S(w), and no beta

Weights as large as t end as 0, so a group with equal magnitudes may keep fewer than N. There is no decay. Kept weights
lose t, so a trained network is not what it was: it is for training from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from openwork.methods.groups import in_groups, of_groups
from openwork.methods.method import Method, State
from openwork.methods.schedule import Phase, Schedule, every_forward
from openwork.methods.schedules import MaskDecay, Ramp, StructureDecay


@dataclass(frozen=True, repr=False)
class SSTE(Method):
    """Train from scratch with a soft threshold; no number to choose. Sparsify after the weights are initialized: their
    scale is that of the first weights. `schedule`: only dense or N:M, because the scale is that of one pattern. Source:
    Hu et al., NeurIPS 2024, arXiv:2409.09099.

    >>> import torch, openwork as ow
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    >>> _ = ow.sparsify(layer, "2:4", ow.SSTE())
    >>> layer.weight.detach()
    tensor([[4.4000, 2.2000, 0.0000, 0.0000]])
    """

    schedule: Schedule = field(default_factory=every_forward, kw_only=True)

    name: ClassVar[str] = "s-ste"
    elementwise: ClassVar[bool] = False
    shared_state: ClassVar[bool] = True
    refused_schedules: ClassVar[tuple[type[Schedule], ...]] = (MaskDecay, StructureDecay, Ramp)

    def state(self, weight: Tensor, phase: Phase) -> State:
        precise = weight if weight.dtype == torch.float64 else weight.float()
        precise = precise / precise.abs().amax().clamp(min=torch.finfo(precise.dtype).tiny)  # squares stay finite
        soft = soft_threshold(precise, self.mask(precise.abs(), phase), phase)
        norm = soft.square().sum()
        scale = torch.where(norm > 0, (precise * soft).sum() / norm, torch.ones_like(norm))
        return {"scale": scale.to(weight.dtype)}

    def forward(self, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        if phase.pattern.is_dense:  # dense for now; the scale is that of the end
            return weight.clone()
        return soft_threshold(weight, mask, phase) * state["scale"].to(weight.dtype)


def soft_threshold(weight: Tensor, mask: Tensor, phase: Phase) -> Tensor:
    """S(w), by the mask of the N largest magnitudes; what is pruned is +0.0."""
    axis, m = phase.axis, phase.pattern.m
    largest = in_groups(torch.where(mask, 0.0, weight.abs()), axis, m).amax(-1)
    threshold = of_groups(largest, axis, m, tuple(weight.shape))
    return torch.where(mask & (weight.abs() > threshold), weight - weight.sign() * threshold, 0.0)
