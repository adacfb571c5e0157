"""The transposable 2:4 mask of CUDA tensors, by Triton where it runs and by the reference elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from openwork.ops.transposable import _keep_transposable


def keep_transposable(score: Tensor, n: int, m: int, dim: int, across: int) -> Tensor:
    if (n, m) == (2, 4) and _works(score.device):
        from openwork.kernels.triton.transposable import keep_2_4

        found = keep_2_4(score, dim, across)
        if found is not None:
            return found
    return _keep_transposable(score, n, m, dim, across)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the kernel is there and right on a small weight: triton may lack a compiler or a driver."""
    if os.environ.get("OPENWORK_TRITON") == "none" or importlib.util.find_spec("triton") is None:
        return False
    from openwork.kernels.triton.transposable import keep_2_4

    probe = torch.arange(64.0, device=device).view(8, 8)
    try:
        found = keep_2_4(probe, 1, 0)
        return found is not None and torch.equal(found, _keep_transposable(probe, 2, 4, 1, 0))
    except Exception:  # triton raises many kinds; the reference does all the same
        return False


def register(operators: Any) -> None:
    """Register it for CUDA on the library that `openwork.ops` opened."""
    operators.impl("keep_transposable", keep_transposable, "CUDA")
