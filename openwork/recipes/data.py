"""Samples of a task, and the batches of them.

Order and augmentation are functions of (seed, epoch, index) and the place of a run is one number, its optimizer steps.
So a resumed run builds a plain DataLoader for the rest of its epoch. torchdata's StatefulDataLoader would keep that
place a second time, and one batch ahead, since Lightning fetches a batch before it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from openwork.utils.counted import counted

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Training samples `train[seed, epoch, index]`, validation samples `val[index]`, and how samples become a batch.

    What a batch holds is between the data and its task; tensors in it go to the device. `sizes` (train_count,) asks for
    batches of samples of like size, so that little is padded. `info` is what else the task must know.
    """

    train: Any
    val: Any
    collate: Callable[[Any], Any] | None = None  # None: torch's own
    workers: int = 0
    skipped: int = 0  # samples that --skip_bad left out
    sizes: np.ndarray | None = None
    info: Any = None

    @property
    def train_count(self) -> int:
        return len(self.train)

    @property
    def val_count(self) -> int:
        return len(self.val)

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> DataLoader[Any]:
        """One batch per index array."""
        return self._loader(self.train, [[(seed, epoch, i) for i in batch.tolist()] for batch in batches])

    def val_batches(self, batches: Sequence[np.ndarray]) -> DataLoader[Any]:
        return self._loader(self.val, [np.asarray(batch).tolist() for batch in batches])

    def all_val_batches(self, most: int, rank: int = 0, world: int = 1) -> DataLoader[Any]:
        """Every validation sample once, or the share of one process of several, at most so many in a batch. A process
        without a sample has one batch, of none: Lightning would leave out its validation, and the others wait."""
        mine = np.arange(rank, self.val_count, world)
        return self.val_batches(np.array_split(mine, max(1, math.ceil(len(mine) / most))))

    def _loader(self, dataset: Any, keys: list[list[Any]]) -> DataLoader[Any]:
        # Its own generator: a DataLoader otherwise takes a number from torch's global one.
        own = torch.Generator()
        collate = _Batched(self.collate or default_collate)
        return DataLoader(dataset, batch_sampler=keys, num_workers=self.workers, collate_fn=collate, generator=own)


@dataclass(frozen=True)
class _Batched:
    """How samples become a batch, and no samples an empty tuple."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        return () if isinstance(samples, list) and not samples else self.collate(samples)


def spaced(items: Sequence[T], count: int) -> Sequence[T]:
    """So many items, evenly spaced (0: all).

    >>> spaced("abcdefg", 3)
    'ace'
    """
    step = max(1, len(items) // count) if count else 1
    return items[::step][: count or None]


def held_out(samples: Sequence[T], count: int) -> tuple[list[T], list[T]]:
    """What is left to train on, and what is held out of training: so many samples, evenly spaced.

    >>> held_out("abcdefg", 2)
    (['b', 'c', 'e', 'f', 'g'], ['a', 'd'])
    """
    check_held_out(count, len(samples))
    held = {*spaced(range(len(samples)), count)}
    return [s for i, s in enumerate(samples) if i not in held], [s for i, s in enumerate(samples) if i in held]


def check_held_out(count: int, samples: int) -> None:
    if count >= samples:
        be = "is" if samples == 1 else "are"
        raise ValueError(f"hold_out is {count}, and there {be} {counted(samples, 'training sample')}: hold out fewer")


def readable(dataset: Any, workers: int = 0) -> list[int]:
    """The numbers of the samples that can be read."""
    good = DataLoader(_Checked(dataset), batch_size=8, num_workers=workers, collate_fn=list)
    return [index for index, fine in enumerate(fine for batch in good for fine in batch) if fine]


@dataclass(frozen=True)
class _Checked(Dataset[bool]):
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> bool:
        try:
            self.dataset[index]
        except (ValueError, OSError):
            return False
        return True
