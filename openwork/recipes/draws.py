"""Random draws as pure functions of (seed, epoch, index): no state to save, so a resumed run repeats them.

A counter-based generator: splitmix64's finaliser (Steele, Lea & Flood, OOPSLA 2014) applied to the key, one word at
a time. Vectorised over samples; a seeded generator object per sample costs 20 us each, this 20 ns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_ORDER, _AUGMENT, _STEP, _BATCHES, _SAMPLE = range(5)  # streams: equal keys in different uses give unrelated numbers
_POOL = 100  # batches whose samples are sorted together: more pad less, and mix less


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _hash(*key: int | np.ndarray) -> np.ndarray:
    """uint64 hash of a key; the arrays in it broadcast."""
    state = np.full(1, _GOLDEN, np.uint64)
    for word in key:
        state = _mix((state ^ np.asarray(word).astype(np.uint64)) + np.uint64(_GOLDEN))
    return state


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` samples: a permutation, int64 (count,)."""
    return np.argsort(_hash(seed, _ORDER, epoch, np.arange(count)), kind="stable")


def uniform(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample index: float64 (len(indices), count)."""
    words = _hash(seed, _AUGMENT, epoch, np.asarray(indices)[:, None], np.arange(count)[None, :])
    return (words >> np.uint64(11)) * 2.0**-53


def seed_step(*key: int) -> None:
    """Seed torch, numpy and Python for one step (dropout and the like) from (seed, step, rank, ...)."""
    word = int(_hash(_STEP, *key)[0])
    torch.default_generator.manual_seed(word)  # torch.manual_seed takes half a millisecond where CUDA is not in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(word)
    np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002 - for code that uses numpy's global generator
    random.seed(word)


@contextmanager
def sample_seed(*key: int) -> Iterator[None]:
    """torch's generator on the CPU seeded for one sample, for transforms that draw from it; afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(_hash(_SAMPLE, *key)[0]))
        yield


def batch_indices(
    seed: int,
    epoch: int,
    count: int,
    batch_size: int,
    *,
    start: int = 0,
    split: int = 1,
    take: Sequence[int] = (0,),
    sizes: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The sample indices of an epoch's batches from batch `start` on; the incomplete last batch is dropped.

    Each batch is cut into `split` equal parts (micro-batches times ranks) of which the parts in `take` are returned,
    so the samples of an optimizer step do not depend on how many devices share it. With `sizes` (count,) a batch
    holds samples of like size, the smallest first.
    """
    visits = order(seed, epoch, count)[: count // batch_size * batch_size]
    if sizes is not None:
        visits = _alike(visits, sizes, batch_size, seed, epoch)
    rows = visits.reshape(-1, split, batch_size // split)
    return [row[part] for row in rows[start:] for part in take]


def _alike(visits: np.ndarray, sizes: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The same visits, sorted by size within each pool of batches; then the batches in an order of their own."""
    pool = _POOL * batch_size
    parts = [visits[start : start + pool] for start in range(0, len(visits), pool)]
    rows = np.concatenate([visits[:0], *(part[np.argsort(sizes[part], kind="stable")] for part in parts)])
    rows = rows.reshape(-1, batch_size)
    return rows[np.argsort(_hash(seed, _BATCHES, epoch, np.arange(len(rows))), kind="stable")].ravel()
