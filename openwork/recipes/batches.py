"""Samples from files, read by processes of their own where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


def loaded(
    dataset: Dataset[Any], batches: Sequence[np.ndarray], workers: int, collate: Callable[[Any], Any] | None = None
) -> Iterator[Any]:
    """The samples of each of `batches` (indices into `dataset`), put together by `collate` (None: stacked)."""
    # Its own generator: a DataLoader otherwise takes a number from torch's global one.
    lists, own = [batch.tolist() for batch in batches], torch.Generator()
    yield from DataLoader(dataset, batch_sampler=lists, num_workers=workers, collate_fn=collate, generator=own)
