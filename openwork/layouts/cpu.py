"""What the kinds of the native library have in common: the layers that they take."""

from __future__ import annotations

import torch

from openwork.layouts.layout import Request

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
WINDOWS = {2: 4, 4: 4, 8: 8, 16: 16, 32: 32}
"""M -> inputs that one permutation chooses from."""


def cpu_refusal(request: Request) -> str:
    """Why no kernel of a CPU can take a layer; empty where one may."""
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"{request.dtype} on a CPU: kernels there are for float32 and bfloat16"
    if request.weight_dtype == torch.int8 and not request.finite:
        return "its weight holds numbers that are not finite, which int8 cannot"
    return ""


def permutation_refusal(m: int) -> str:
    """Why inputs of a group of M are not picked by a permutation; empty where they are."""
    known = ", ".join(map(str, WINDOWS))
    return "" if m in WINDOWS else f"M={m}: inputs are picked by permutations, which there are for M = {known}"
