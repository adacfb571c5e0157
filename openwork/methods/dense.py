"""Dense training that only watches the mask it *would* have: the reference curve for topology metrics.

forward        w~ = w
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """No zeros; `Topology` records how the magnitude mask would move."""

    name: ClassVar[str] = "dense"
    fixed: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def forward(self, weight: Tensor, keep: Tensor) -> Tensor:
        return weight
