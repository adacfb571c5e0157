"""MdGf: mask decay with gradient flow (Bambhaniya et al., 2024, arXiv:2402.04744), STE whose mask comes slowly.

    forward        w~ = w where kept, else beta * w     the mask is chosen anew in every forward
    backward       dL/dw = dL/dw~ where kept, else beta * dL/dw~   (the authors' JAX code: the product's derivative)
    beta           after t of T optimizer steps: linear 1 - t / T, exponential exp(-k t); 0 from step T on

The authors' torch code passes the gradient unchanged: `straight_through=True`. There is no decay. An exponential never
reaches 0, so the last step cuts it off; k is such that a thousandth is left then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from openwork.methods.method import Method, State
from openwork.methods.schedule import Phase, Schedule
from openwork.methods.schedules import MaskDecay


@dataclass(frozen=True)
class MdGf(Method):
    """STE with a mask that decays in over `steps` optimizer steps; N:M only from then on. `linear`: beta falls in a
    line, instead of exponentially, which the authors found best. `straight_through`: pass the whole gradient, as their
    torch code does, instead of beta times it. Source: Bambhaniya et al., 2024, arXiv:2402.04744.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "2:4", ow.MdGf(100))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'mask decay beta = 1: not yet 2:4 (step 0 of 100)'
    """

    steps: int
    linear: bool = False
    straight_through: bool = False

    name: ClassVar[str] = "mdgf"

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps={self.steps!r}; needed the optimizer steps until the mask is N:M, 1 or more")

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return MaskDecay(steps=self.steps, linear=self.linear)

    def backward(self, gradient: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        if self.straight_through:
            return gradient
        decays = isinstance(phase.beta, Tensor)  # at the end an infinite gradient times 0 would be NaN
        return torch.where(mask, gradient, gradient * phase.beta if decays else 0.0)
