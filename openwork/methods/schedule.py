"""When a mask is chosen, and what is in force at each optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern


@dataclass(frozen=True)
class Phase:
    """What holds for a weight at one step: the pattern of its mask, along which axes, and `beta`, the share of the
    pruned weights that the forward still sees (mask decay; 0 is the mask itself).

    `beta` is a number. The rules of a method get a tensor with that number, so that compiled code stays as it is when
    the number changes.
    """

    pattern: Pattern
    axis: Axis
    output_axis: Axis | None = None
    beta: float | Tensor = 0.0

    def __str__(self) -> str:
        return f"mask decay beta = {float(self.beta):.2g}" if self.beta else f"pattern {self.pattern}"


@dataclass(frozen=True)
class Schedule:
    """The mask follows the weight: it is chosen in every forward, from the first step to the last.

    `refresh_every` says when masks are chosen instead: after so many optimizer steps, or, where it is None, only once,
    by `sparsify`. Such masks are stored, and are part of the state dict. A schedule with `steps` changes what is in
    force: it defines `at`, which is asked before step `steps` is done; from then on what `sparsify` was given holds.
    """

    refresh_every: int | None = 0
    steps: int = 0

    def __post_init__(self) -> None:
        for name, number, least in (("refresh_every", self.refresh_every, 0), ("steps", self.steps, 0)):
            if number is not None and (type(number) is not int or number < least):
                raise ValueError(f"{name}={number!r}; needed a number of optimizer steps, {least} or more")

    def at(self, step: int, end: Phase) -> Phase:
        """What is in force when `step` optimizer steps are done; `end` is what holds after the last."""
        return end

    def phase(self, step: int, end: Phase) -> Phase:
        """`at`, and the end once the schedule has ended."""
        return self.at(step, end) if step < self.steps else end

    @property
    def stores_mask(self) -> bool:
        """Whether masks are kept between forwards, instead of being recomputed from the weight."""
        return self.refresh_every is None or self.refresh_every > 0

    @property
    def counts_steps(self) -> bool:
        """Whether anything depends on the number of optimizer steps."""
        return bool(self.refresh_every) or self.steps > 0


EVERY_FORWARD = Schedule()
ONCE = Schedule(refresh_every=None)
