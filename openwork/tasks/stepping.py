"""Parts of a training loop: the schedule, a loader over given samples, a stopwatch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine that reaches 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Batches:
    """A sized loader over given sample indices."""

    def __init__(self, indices: Sequence[np.ndarray], load: Any) -> None:
        self._indices, self._load = indices, load

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
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
