"""Absmax quantization to int8 and float8: one scale a row, weights and inputs alike. x ~ numbers * scale.

Symmetric, without a zero point: the largest magnitude of a row becomes 127 in int8, 448 in float8_e4m3fn.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX, FLOAT8_MAX = 127, 448.0
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, ...) as int8 or float8_e4m3fn, and one scale for all but the first dim: float32 (B,).

    >>> quantize(torch.tensor([[1.27, -0.5]]), torch.int8)
    (tensor([[127, -50]], dtype=torch.int8), tensor([0.0100]))
    """
    if dtype == torch.int8:
        whole, scales = quantize_to_whole(x.float())
        return whole.to(torch.int8), scales
    scales = scale_of(_absmax(x.float())) * (INT8_MAX / FLOAT8_MAX)
    return (x.float() / _per_row(scales, x)).to(dtype), scales


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight (O, ...) in the dtype that a kernel keeps it in, and where that is int8 or float8 one scale an output.
    Raises ValueError where int8 has no such numbers."""
    if dtype not in QUANTIZED:
        return weight.to(dtype), None
    numbers, scales = quantize(weight, dtype)
    if dtype == torch.int8 and not scales.isfinite().all():
        raise ValueError(
            f"the weight {tuple(weight.shape)} holds numbers that are not finite, which int8 cannot: store float32"
        )
    return numbers, scales


def quantize_to_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8's numbers as floats, so that NaN stays: float32 (B, ...) -> whole floats, scales (B,).

    >>> quantize_to_whole(torch.tensor([[1.0, -0.5]]))
    (tensor([[127., -64.]]), tensor([0.0079]))
    """
    scales = scale_of(_absmax(x))
    return (x / _per_row(scales, x)).round(), scales


def scale_of(largest: Tensor) -> Tensor:
    """What whole numbers from -127 to 127 are multiplied with, from the largest magnitude: NaN and infinity stay, zeros
    and what is next to them (below 2**-126 floats lose digits) give 1.

    >>> scale_of(torch.tensor([254.0, 0.0, torch.nan]))
    tensor([2., 1., nan])
    """
    scale = largest / INT8_MAX
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _absmax(x: Tensor) -> Tensor:
    return x.flatten(1).abs().amax(1)


def _per_row(scales: Tensor, x: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (x.ndim - 1))
