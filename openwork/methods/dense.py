"""Dense training that only watches the mask it *would* have: the reference curve for topology metrics.

forward        w~ = w
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.methods.method import Method, State
from openwork.methods.schedule import Phase


@dataclass(frozen=True)
class Dense(Method):
    """No zeros; `Topology` records how the magnitude mask would move."""

    name: ClassVar[str] = "dense"
    sparse: ClassVar[bool] = False

    def forward(self, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        return weight
