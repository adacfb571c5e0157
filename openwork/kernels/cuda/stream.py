"""What code that launches on a GPU has to know of CUDA's current state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: launches, streams, events and graphs belong to that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(*tensors: Tensor) -> bool:
    """Whether what is launched on tensors of one device now becomes part of a CUDA graph."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
