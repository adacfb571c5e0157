"""The schedules of the papers, for any method that takes one. t of T: the optimizer steps done, and `steps`.

MaskDecay       beta: linear 1 - t / T, exponential exp(-k t)          Bambhaniya et al., 2024, arXiv:2402.04744
StructureDecay  (M-1):M, M/2:M, M/4:M, ... N:M in equal frames         there too: SdGf
Ramp            a falling share of the groups is dense                 MaxQ, Xiang et al., CVPR 2024, arXiv:2312.07061
DenseWarmup     dense at first
DenseTail       dense in the end                                       Hu et al., ICML 2024, arXiv:2404.01847
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from openwork.methods.schedule import Phase, Schedule, every_forward
from openwork.nm.pattern import Pattern

_LARGEST_M = 64


@dataclass(frozen=True, repr=False)
class MaskDecay(Schedule):
    """The mask comes slowly: of the pruned weights a share is still there, 1 at the start, 0 after `steps`. An
    exponential, unless `linear`; it never reaches 0, so the last step cuts it off, where a thousandth is left. Source:
    MdGf, arXiv:2402.04744.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "2:4", ow.STE(schedule=ow.MaskDecay(100)))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'mask decay beta = 1: not yet 2:4 (step 0 of 100)'
    """

    steps: int
    linear: bool = False

    least_steps: ClassVar[int] = 1

    def at(self, step: int, end: Phase) -> Phase:
        done = step / self.steps
        return replace(end, beta=1 - done if self.linear else math.exp(-math.log(1000) * done))


@dataclass(frozen=True, repr=False)
class StructureDecay(Schedule):
    """The pattern tightens by stages: (M-1):M, M/2:M, M/4:M, ... in frames of equal length, N:M after `steps`.

    `geometric`: kN:kM instead, k = 8, 4, 2, as far as kM <= 64: the density of the end, in larger groups. The authors
    give N:M a frame of the same length, so go on for as long at least. Source: SdGf, arXiv:2402.04744.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "1:16", ow.STE(schedule=ow.StructureDecay(100)))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'pattern 15:16: not yet 1:16 (step 0 of 100)'
    """

    steps: int
    geometric: bool = False

    least_steps: ClassVar[int] = 1

    def at(self, step: int, end: Phase) -> Phase:
        before = self.patterns(end.pattern)
        return replace(end, pattern=before[step * len(before) // self.steps]) if before else end

    def patterns(self, end: Pattern) -> list[Pattern]:
        """Those before the last.

        >>> [str(each) for each in StructureDecay(100).patterns(Pattern(1, 16))]
        ['15:16', '8:16', '4:16', '2:16']
        """
        n, m = end.n, end.m
        if self.geometric:
            return [Pattern(k * n, k * m) for k in (8, 4, 2) if k * m <= _LARGEST_M]
        halves = [m >> power for power in range(1, m.bit_length()) if n < m >> power < m - 1]
        return [Pattern(each, m) for each in ([m - 1] if m - 1 > n else []) + halves]


_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cubic": lambda done: (1 - done) ** 3,
    "cosine": lambda done: math.cos(math.pi / 2 * done),
    "exponential": lambda done: (
        1 - math.expm1(-1.5 * done) / math.expm1(-1.5)
    ),  # the authors': 0.05 in each of 30 epochs
}


@dataclass(frozen=True, repr=False)
class Ramp(Schedule):
    """One group after the other becomes N:M: a share of them, those with the smallest L1 norm of each weight, stays
    dense, all at the start, none after `steps`. `curve`: how it falls; linear, cubic, cosine or exponential. Source:
    MaxQ, arXiv:2312.07061.

    To rank all groups of a weight that is spread over processes, it is gathered in each forward until the end.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "1:4", ow.SRSTE(schedule=ow.Ramp(100)))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    '100.0% of the groups dense: not yet 1:4 (step 0 of 100)'
    """

    steps: int
    curve: str = "linear"

    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curve not in _CURVES:
            raise ValueError(f"curve={self.curve!r}; needed one of {', '.join(_CURVES)}")

    def at(self, step: int, end: Phase) -> Phase:
        return replace(end, dense_groups=_CURVES[self.curve](step / self.steps))


@dataclass(frozen=True, repr=False)
class DenseWarmup(Schedule):
    """Dense for `steps` optimizer steps; from then on `then`, whose steps count from there.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "2:4", ow.STE(schedule=ow.DenseWarmup(10, ow.MaskDecay(100))))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'pattern 4:4: not yet 2:4 (step 0 of 110)'
    """

    steps: int
    then: Schedule = field(default_factory=every_forward)

    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _take_refresh(self, self.then)
        super().__post_init__()

    def at(self, step: int, end: Phase) -> Phase:
        return end.dense if step < self.steps else self.then.phase(step - self.steps, end)

    @property
    def length(self) -> int:
        return self.steps + self.then.length

    @property
    def ends_dense(self) -> bool:
        return self.then.ends_dense

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return self, *self.then.parts


@dataclass(frozen=True, repr=False)
class DenseTail(Schedule):
    """Sparse for `steps` optimizer steps, as `before` says, and dense from then on: the model ends dense. For training
    that sparse tensor cores make faster, not for a sparse model: `ow.verify` and `ow.save` hold it to no pattern.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Linear(16, 4)
    >>> _ = ow.sparsify(model, "2:4", ow.STE(schedule=ow.DenseTail(100)))
    >>> ow.attach(torch.optim.AdamW(model.parameters()), model).unfinished
    'pattern 2:4: dense from step 100 on (step 0)'
    """

    steps: int
    before: Schedule = field(default_factory=every_forward)

    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _take_refresh(self, self.before)
        super().__post_init__()
        if self.before.ends_dense or self.before.length >= self.steps:
            raise ValueError(
                f"DenseTail({self.steps}) after {self.before}, which is N:M only from step {self.before.length} on; "
                "needed one that is so before the tail begins"
            )

    def at(self, step: int, end: Phase) -> Phase:
        return self.before.phase(step, end)

    @property
    def ends_dense(self) -> bool:
        return True

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return self, *self.before.parts


def _take_refresh(schedule: Schedule, inner: Schedule) -> None:
    """A schedule around another one chooses masks when that does, unless it says otherwise."""
    if not isinstance(inner, Schedule):
        raise TypeError(f"found {inner!r} within a schedule; needed one, such as ow.MaskDecay(1000)")
    if schedule.refresh_every == 0:
        object.__setattr__(schedule, "refresh_every", inner.refresh_every)
