"""One launch for a list of tensors: the table that says where each lies, and which program works on which."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> Any:
    """Launch where the tensor is; triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.lru_cache(maxsize=64)
def programs(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tensor each program works on, int32, where each tensor has so many programs.

    >>> programs((2, 1), torch.device("cpu")).tolist()
    [0, 0, 1]
    """
    return torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts)).to(device)


@functools.lru_cache(maxsize=64)
def table(rows: tuple[tuple[int, ...], ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """A row of numbers for each tensor, and its first program, int64. Kept, since gradients mostly come back to the
    addresses that they had in the step before.

    >>> table(((7, 8), (9, 10)), (2, 1), torch.device("cpu")).tolist()
    [[7, 8, 0], [9, 10, 2]]
    """
    first = [sum(counts[:each]) for each in range(len(counts))]
    return torch.tensor([[*row, start] for row, start in zip(rows, first, strict=True)], dtype=torch.int64).to(device)
