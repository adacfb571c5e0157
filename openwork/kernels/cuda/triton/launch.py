"""One launch for a list of tensors: the table that says where each lies, and which program works on which."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor


def table(rows: Sequence[tuple[int, ...]], counts: Sequence[int], device: torch.device) -> Tensor:
    """The first program of each tensor and a row of numbers, int64, where each tensor has so many programs.

    From pinned memory, so that the host does not wait; on the stream that reads it, so that its memory is not given
    away before.

    >>> table([(7, 8), (9, 10)], [2, 1], torch.device("cpu")).tolist()
    [[0, 7, 8], [2, 9, 10]]
    """
    first = accumulate(counts[:-1], initial=0)
    made = torch.tensor([[start, *row] for start, row in zip(first, rows, strict=True)], dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


@triton.jit
def row_of(rows, tensors, program, COLUMNS: tl.constexpr):
    """The row of a table (tensors, COLUMNS) that a program works on: the last whose first program is not later."""
    low = 0
    high = tensors
    while high - low > 1:
        middle = (low + high) // 2
        later = tl.load(rows + middle * COLUMNS) > program
        low = tl.where(later, low, middle)
        high = tl.where(later, middle, high)
    return low
