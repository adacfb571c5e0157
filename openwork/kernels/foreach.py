"""What the kernels of the mask operators do better than their references, asked before the way is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.kernels.cpu.masks import TAKEN
from openwork.kernels.cuda.stream import capturing
from openwork.kernels.registry import available
from openwork.ops.library import has_operators


def fuses(weight: Tensor) -> bool:
    """Whether `openwork.ops.foreach_prune` and `foreach_decay` read this weight once, without making a mask first."""
    return has_operators(weight) and weight.dtype in TAKEN and available(weight.device.type)


def batches(weight: Tensor) -> bool:
    """Whether operators take many weights like this one in one launch, instead of one for each. Not where a CUDA graph
    is captured, or compiled code may become one: a list is a table of addresses, which the graph would have to hold,
    and launches in a graph cost next to nothing."""
    return weight.is_cuda and not torch.compiler.is_compiling() and not capturing(weight)
