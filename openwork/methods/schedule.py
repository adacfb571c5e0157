"""When a mask is chosen, and what is in force at each optimizer step. `openwork.methods.schedules` has the papers'."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern


@dataclass(frozen=True)
class Phase:
    """What holds for a weight at one step: the pattern of its mask, along which axes; `beta`, the share of the pruned
    weights that the forward still sees (mask decay; 0 is the mask itself); `dense_groups`, the share of the groups that
    are not pruned yet, those with the smallest sums of scores.

    Both are numbers. The rules of a method get tensors with these numbers, so that compiled code stays as it is when
    they change; a number that is 0 stays a number.
    """

    pattern: Pattern
    axis: Axis
    output_axis: Axis | None = None
    beta: float | Tensor = 0.0
    dense_groups: float | Tensor = 0.0

    def __str__(self) -> str:
        if self.beta:
            return f"mask decay beta = {float(self.beta):.2g}"
        return f"{float(self.dense_groups):.1%} of the groups dense" if self.dense_groups else f"pattern {self.pattern}"

    @property
    def dense(self) -> Phase:
        """That every weight is kept."""
        return Phase(Pattern(self.pattern.m, self.pattern.m), self.axis)

    @property
    def is_pattern(self) -> bool:
        """Whether the weights are pruned to the pattern now."""
        return not (isinstance(self.beta, Tensor) or isinstance(self.dense_groups, Tensor))

    def followed_by(self, now: Phase) -> Phase:
        """`now` with its numbers as tensors: this very phase, in whose tensors they are written, where nothing but
        numbers differs."""
        alike = now == replace(self, beta=now.beta, dense_groups=now.dense_groups)
        for name in ("beta", "dense_groups"):
            alike = alike and bool(getattr(now, name)) == isinstance(getattr(self, name), Tensor)
        if alike:
            _fill(self.beta, now.beta)
            _fill(self.dense_groups, now.dense_groups)
            return self
        return replace(now, beta=_tensor(now.beta), dense_groups=_tensor(now.dense_groups))


def _fill(tensor: float | Tensor, number: float | Tensor) -> None:
    if isinstance(tensor, Tensor):
        tensor.fill_(number)


def _tensor(number: float | Tensor) -> float | Tensor:
    if not number:
        return 0.0
    with torch.inference_mode(False):  # it is written to in training, whoever loads
        return torch.tensor(float(number), dtype=torch.float64, device="cpu")


@dataclass(frozen=True, repr=False)
class Schedule:
    """The mask follows the weight: it is chosen in every forward, from the first step to the last.

    `refresh_every` says when masks are chosen instead: after so many optimizer steps, or, where it is None, only once,
    by `sparsify`. Such masks are stored, and are part of the state dict. A schedule with `steps` changes what is in
    force: it defines `at`, which is asked before step `steps` is done; from then on what `sparsify` was given holds.

    >>> import torch, openwork as ow
    >>> _ = ow.sparsify(layer := torch.nn.Linear(8, 4), "2:4", ow.STE(schedule=ow.Schedule(refresh_every=100)))
    >>> sorted(layer.state_dict())
    ['bias', 'weight', 'weight_mask', 'weight_mask_age']
    """

    steps: int = 0
    refresh_every: int | None = field(default=0, kw_only=True)

    least_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name, number, least in (("refresh_every", self.refresh_every, 0), ("steps", self.steps, self.least_steps)):
            if number is not None and (type(number) is not int or number < least):
                raise ValueError(f"{name}={number!r}; needed a number of optimizer steps, {least} or more")

    def __repr__(self) -> str:
        return shown(self)

    def at(self, step: int, end: Phase) -> Phase:
        """What is in force when `step` optimizer steps are done; `end` is what `sparsify` was given."""
        return end

    def phase(self, step: int, end: Phase) -> Phase:
        """`at`, and the end once the schedule has ended."""
        if step < self.length:
            return self.at(step, end)
        return end.dense if self.ends_dense else end

    @property
    def length(self) -> int:
        """The optimizer steps until nothing changes any more."""
        return self.steps

    @property
    def ends_dense(self) -> bool:
        """Whether every weight is kept in the end."""
        return False

    @property
    def parts(self) -> tuple[Schedule, ...]:
        """The schedules that this one is made of, itself among them."""
        return (self,)

    @property
    def stores_mask(self) -> bool:
        """Whether masks are kept between forwards, instead of being recomputed from the weight."""
        return self.refresh_every is None or self.refresh_every > 0

    @property
    def counts_steps(self) -> bool:
        """Whether anything depends on the number of optimizer steps."""
        return bool(self.refresh_every) or self.length > 0


def shown(value: Any) -> str:
    """A dataclass as one writes it: without what is given by keyword alone, where that is the default.

    >>> shown(Schedule(refresh_every=40)), shown(Schedule())
    ('Schedule(steps=0, refresh_every=40)', 'Schedule(steps=0)')
    """
    said = [each for each in fields(value) if not (each.kw_only and getattr(value, each.name) == _default(each))]
    return f"{type(value).__qualname__}({', '.join(f'{each.name}={getattr(value, each.name)!r}' for each in said)})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


EVERY_FORWARD = Schedule()
ONCE = Schedule(refresh_every=None)


def every_forward() -> Schedule:
    """The schedule of methods that are given none: a factory, since compilers take no object for a default."""
    return EVERY_FORWARD
