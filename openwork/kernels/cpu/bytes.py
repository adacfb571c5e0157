"""Products that take bytes and give bytes, on the native library: see openwork/ops/bytes.py for what they compute."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.kernels.cpu import checks, native
from openwork.kernels.cpu.linear import warn_of_reference
from openwork.kernels.cpu.native import DTYPES, Isa, address, done
from openwork.ops import bytes as reference
from openwork.ops.bytes import Form, form_of


def to_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    isa = native.isa()
    if isa is None or not isa.dot_product:
        return reference.to_bytes(x, scale, zero)
    x = _stretch(x, torch.float32)
    y = torch.empty_like(x, dtype=torch.uint8)
    if not 0 <= zero <= 255 or not scale:
        raise ValueError(f"scale {scale}, zero point {zero}; needed a scale other than 0 and one of 0 to 255")
    done(isa.lib.openwork_to_bytes(isa.kernels, address(x), x.numel(), 1.0 / scale, zero, y.data_ptr()))
    return y


def from_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    isa = native.isa()
    if isa is None or not isa.dot_product:
        return reference.from_bytes(x, scale, zero)
    x = _stretch(x, torch.uint8)
    y = torch.empty_like(x, dtype=torch.float32)
    done(isa.lib.openwork_from_bytes(isa.kernels, address(x), x.numel(), scale, zero, y.data_ptr()))
    return y


def bytes_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[int],
    residual: Tensor | None,
    whole: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    isa = native.isa()
    if isa is None or not isa.dot_product:
        warn_of_reference()
        return reference.bytes_linear(x, packed, outputs, numbers, residual, whole, scales)
    sizes, form = checks.check_dot_product(isa, packed, outputs[1], numbers), form_of(whole, scales)
    flat, O = checks.rows_of(x, sizes.numbers.inputs, torch.uint8), sizes.numbers.outputs
    y = x.new_empty(*x.shape[:-1], O, dtype=_result(form))
    _run(isa, packed, outputs, sizes, flat, None, residual, y, form)
    return y


def bytes_conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[int],
    residual: Tensor | None,
    whole: Sequence[int],
    scales: Sequence[float],
    geometry: Sequence[int],
) -> Tensor:
    isa = native.isa()
    if isa is None or not isa.dot_product:
        warn_of_reference()
        return reference.bytes_conv2d(x, packed, outputs, numbers, residual, whole, scales, geometry)
    sizes, form = checks.check_dot_product(isa, packed, outputs[1], numbers), form_of(whole, scales)
    conv = checks.geometry_of(tuple(geometry))
    checks.check_channels(x, conv, sizes.numbers)
    if conv.groups != 1 or x.dtype != torch.uint8:
        raise ValueError(f"images of {x.dtype} in {conv.groups} groups; needed uint8, and one group")
    (high, wide), short = checks.output_size(x, conv), -x.shape[1] % sizes.numbers.m
    images = x.permute(0, 2, 3, 1)
    images = F.pad(images, (0, short)) if short else images.contiguous()
    y = x.new_empty(len(x), high, wide, sizes.numbers.outputs, dtype=_result(form))
    added = None if residual is None else residual.permute(0, 2, 3, 1)
    if conv.kernel == conv.stride == (1, 1) and conv.padding == (0, 0):  # rows of a matrix
        _run(isa, packed, outputs, sizes, images.view(-1, images.shape[3]), None, added, y, form)
    else:
        rest = (*x.shape[2:], high, wide, *conv.stride, *conv.padding, *conv.dilation, conv.kernel[1])
        _run(isa, packed, outputs, sizes, images, native.Pixels(images.shape[3], *rest), added, y, form)
    return y.permute(0, 3, 1, 2)


def _run(
    isa: Isa,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    sizes: checks.DotProductSizes,
    x: Tensor,
    pixels: native.Pixels | None,
    residual: Tensor | None,
    y: Tensor,
    form: Form,
) -> None:
    """Into y (..., O), whose rows lie side by side."""
    each, bias, sums = outputs
    O, K = sizes.numbers.outputs, sizes.numbers.inputs
    if each.shape != (O,) or sums.shape != (O,) or each.dtype != torch.float32 or sums.dtype != torch.int32:
        raise ValueError(f"scales {tuple(each.shape)} and sums {tuple(sums.shape)}; needed float32 and int32 ({O},)")
    if residual is not None:
        if residual.shape != y.shape or residual.dtype not in (torch.uint8, torch.float32):
            found = f"{tuple(residual.shape)} of {residual.dtype}"
            raise ValueError(f"residual {found}; needed {tuple(y.shape)} of uint8 or float32")
        residual = residual.contiguous()
    if not y.numel():
        return
    requantize = native.Requantize(
        *(address(sums.contiguous()), address(residual), form.zero, form.residual_zero, form.y_zero),
        *(residual is not None and residual.dtype == torch.float32, not form.y_scale),
        *(form.residual_scale, 1.0 / form.y_scale if form.y_scale else 0.0),
    )
    weight = (address(packed[0]), address(packed[1]), sizes.windows, sizes.blocks)
    where = ctypes.addressof(pixels) if pixels is not None else None
    inputs = (checks.rows_at(x) if pixels is None else address(x), x.stride(0), K, where, None, 0)
    given = (address(bias), address(each.contiguous()), None, y.data_ptr(), O, O, y.numel() // O)
    call = native.DotProductCall(*weight, *inputs, *given, sizes.steps, form.activation, ctypes.addressof(requantize))
    threads = torch.get_num_threads()
    scratch = torch.empty(
        isa.lib.openwork_dot_product_scratch(isa.kernels, ctypes.byref(call), threads), dtype=torch.uint8, device="cpu"
    )
    call.packed = scratch.data_ptr()
    done(isa.lib.openwork_dot_product(isa.kernels, ctypes.byref(call), DTYPES[torch.int8], threads))


def _result(form: Form) -> torch.dtype:
    return torch.uint8 if form.y_scale else torch.float32


def _stretch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In one stretch of memory, images with their channels last."""
    if x.dtype != dtype:
        raise ValueError(f"a tensor of {x.dtype}; needed {dtype}")
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
