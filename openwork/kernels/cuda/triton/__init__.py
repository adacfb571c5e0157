"""Triton kernels for CUDA tensors: masks, topology, skinny GEMM. Imported only where they run.

`triton` compiles them on first use, for the GPU at hand. Without it, or where it cannot compile (no C compiler for its
launcher), every operator runs its reference, and `reason` says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re

import torch

from openwork.utils.torch_private import without_modes


def is_available() -> bool:
    """Whether CUDA tensors have these kernels."""
    return not reason()


class _ForNow(Exception):
    """A reason that may be gone the next time."""


def reason() -> str:
    """Why CUDA tensors have no Triton kernels here; empty where they have. The variable OPENWORK_TRITON=none turns them
    off."""
    try:
        return _lasting()
    except _ForNow as passing:
        return str(passing)


@functools.cache
def _lasting() -> str:
    """`reason`, found once in a process."""
    if os.environ.get("OPENWORK_TRITON") == "none":
        return "OPENWORK_TRITON=none"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton, in the version that this torch names"
    if torch.cuda.is_current_stream_capturing():
        raise _ForNow("no kernel ran before a CUDA graph was captured, and none can be tried meanwhile")
    return _failure()


def triton_status() -> str:
    """What runs on CUDA tensors and, if nothing of ours, why."""
    if reason():
        return f"no Triton kernels: {reason()}"
    return f"Triton kernels: triton {importlib.import_module('triton').__version__}"


def _failure() -> str:
    """What happens when the smallest kernel runs; empty where all is well. Raises `_ForNow` where that may change."""
    try:
        from openwork.kernels.cuda.triton import masks

        with without_modes():  # it may be asked first while a compiler traces with tensors that hold nothing
            probe = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device="cuda")
            found = masks.foreach_prune([probe], 2, 4, [1, 1, 0])[0].tolist()
    except Exception as error:  # a missing compiler, driver or device function: triton raises many kinds
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("openwork"):
            raise  # ours
        said = f"triton does not run here: {type(error).__name__}: {str(error)[:200]}"
        # A capture in another thread forbids what a first launch does; memory may be there later.
        if isinstance(error, torch.cuda.OutOfMemoryError) or re.search("captur|out of memory", str(error)):
            raise _ForNow(said) from error
        return said
    return "" if found == [[0.0, 0.0, 3.0, 4.0]] else f"triton computes wrongly here: {found} for 2:4 of 1, 2, 3, 4"
