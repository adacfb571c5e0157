"""SdGf: structure decay with gradient flow (Bambhaniya et al., 2024, arXiv:2402.04744), STE whose pattern tightens.

    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
    pattern        (M-1):M, then M/2:M, M/4:M, ... in frames of equal length; N:M after `steps` optimizer steps

There is no decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from openwork.methods.method import Method
from openwork.methods.schedule import Schedule
from openwork.methods.schedules import StructureDecay


@dataclass(frozen=True)
class SdGf(Method):
    """STE at patterns that tighten over `steps` optimizer steps; N:M only from then on. `geometric`: kN:kM with a
    falling k instead, as far as kM <= 64. Source: Bambhaniya et al., 2024, arXiv:2402.04744.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "1:16", ow.SdGf(100))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'pattern 15:16: not yet 1:16 (step 0 of 100)'
    """

    steps: int
    geometric: bool = False

    name: ClassVar[str] = "sdgf"

    def __post_init__(self) -> None:
        StructureDecay(self.steps)  # which checks it

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        return StructureDecay(self.steps, self.geometric)
