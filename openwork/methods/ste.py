"""STE: the straight-through estimator with a mask that follows the weights (Bengio et al., 2013, arXiv:1308.3432,
for N:M in Zhou et al., ICLR 2021, arXiv:2102.04010, the baseline there).

    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from openwork.methods.method import Method
from openwork.methods.schedule import Schedule, every_forward


@dataclass(frozen=True, repr=False)
class STE(Method):
    """Train from scratch; pruned weights keep learning and may come back."""

    schedule: Schedule = field(default_factory=every_forward, kw_only=True)

    name: ClassVar[str] = "ste"
