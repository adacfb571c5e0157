"""Parts of a training loop: the schedule, a loader over given samples, a stopwatch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SCHEDULES = ("cosine", "linear", "steps", "inverse-sqrt", "constant")


def lr_factor(step: int, warmup: int, total: int, schedule: str = "cosine", drops: Sequence[int] = ()) -> float:
    """Linear warm-up over `warmup` steps, then the schedule. Cosine and linear reach 0 at `total`; "steps" divides by
    ten at each of `drops`; "inverse-sqrt" falls with the root of the steps since the start (Vaswani et al. 2017).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1 - done
    if schedule == "steps":
        return 0.1 ** sum(step >= drop for drop in drops)
    if schedule == "inverse-sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    return 1.0


class Batches:
    """A sized loader over given sample indices."""

    def __init__(self, indices: Sequence[np.ndarray], load: Any) -> None:
        self._indices, self._load = indices, load

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Any]:
        return self._load(self._indices)


class Stopwatch:
    """Seconds from one step's end to the next, with the loading of data and without validation and checkpoints."""

    def __init__(self) -> None:
        self._last: float | None = None
        self.seconds: list[float] = []

    def skip(self) -> None:
        self._last = None

    def tick(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(round(now - self._last, 6))
        self._last = now
