"""Linear layers with a compressed weight on the native library."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.kernels.cpu import checks, native
from openwork.kernels.cpu.native import DTYPES, Isa, address, done
from openwork.layouts import DotProduct, Gemm, Gemv
from openwork.nm.quantize import quantize_to_whole
from openwork.ops import sparse_matmul as reference
from openwork.utils.caller import outside


def gemm_linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool) -> Tensor:
    isa = native.isa()
    if isa is None:
        return reference.linear(Gemm, x, packed, bias, numbers, relu)
    weight, named = checks.gemm_weight(isa, packed, bias, numbers)
    flat, O = checks.rows_of(x, named.inputs), named.outputs
    y = flat.new_empty(len(flat), O)
    if y.numel():
        call = native.GemmLinear(weight, checks.rows_at(flat), y.data_ptr(), None, len(flat), flat.stride(0), O, relu)
        scratch = flat.new_empty(
            isa.lib.openwork_gemm_linear_scratch(isa.kernels, ctypes.byref(call)), dtype=torch.uint8
        )
        call.scratch = scratch.data_ptr()
        checks.gemm_done(isa.lib.openwork_gemm_linear(isa.kernels, ctypes.byref(call)), packed, named)
    return y.view(*x.shape[:-1], O)


def gemv_linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool) -> Tensor:
    isa = native.isa()
    if isa is None:
        return reference.linear(Gemv, x, packed, bias, numbers, relu)
    values, indices, scales = checks.split(packed)
    sizes = checks.check_gemv(isa, values, indices, scales, bias, numbers)
    flat, O = checks.rows_of(x, sizes.numbers.inputs), sizes.numbers.outputs
    B, short = flat.shape[0], -sizes.numbers.inputs % sizes.window
    y = flat.new_empty(B, O)
    if not B:
        return y.view(*x.shape[:-1], O)
    layout = (address(values), address(indices), sizes.windows, sizes.blocks, sizes.window, sizes.slots)
    if scales is None:
        flat = F.pad(flat, (0, short)) if short else flat
        given = (checks.rows_at(flat), flat.stride(0), address(bias), y.data_ptr())
        call = native.GemvCall(*layout, *given, O, O, B, relu)
        done(isa.lib.openwork_gemv(isa.kernels, ctypes.byref(call), DTYPES[values.dtype]))
    else:
        whole, input_scales = quantize_to_whole(flat)
        whole = F.pad(whole, (0, short)).int() & 0xFFFF  # the kernel multiplies pairs of int16
        given = (whole.data_ptr(), whole.stride(0), None, y.data_ptr())
        call = native.GemvCall(*layout, *given, O, O, B, False)
        done(isa.lib.openwork_gemv(isa.kernels, ctypes.byref(call), DTYPES[torch.int8]))
        y = y.view(torch.int32).float().mul_(input_scales[:, None] * scales)
        y = y if bias is None else y.add_(bias)
        y = y.relu_() if relu else y
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


def dot_product_linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool
) -> Tensor:
    isa = native.isa()
    if isa is None or not isa.dot_product:
        warn_of_reference()
        return reference.linear(DotProduct, x, packed, bias, numbers, relu)
    sizes = checks.check_dot_product(isa, packed, bias, numbers)
    O, int8 = sizes.numbers.outputs, len(packed) == 3
    flat = checks.rows_of(x, sizes.numbers.inputs, torch.float32 if int8 else torch.bfloat16)
    y = flat.new_empty(len(flat), O)
    run_dot_product(isa, packed, bias, sizes, flat, None, flat.new_empty(len(flat)), y, relu)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


def run_dot_product(
    isa: Isa,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    sizes: checks.DotProductSizes,
    x: Tensor,
    pixels: native.Pixels | None,
    x_scales: Tensor,
    y: Tensor,
    relu: bool,
) -> None:
    """Into y, rows of outputs. `x_scales` float32, given for `pixels`, else written."""
    if not y.numel():
        return
    values, indices, scales = checks.split(packed)
    O, K = sizes.numbers.outputs, sizes.numbers.inputs
    weight = (address(values), address(indices), sizes.windows, sizes.blocks)
    where = ctypes.addressof(pixels) if pixels is not None else None
    inputs = (checks.rows_at(x) if pixels is None else address(x), x.stride(0), K, where, None, 0)
    outputs = (address(bias), address(scales), x_scales.data_ptr(), y.data_ptr(), O, O, y.numel() // O)
    call, threads = native.DotProductCall(*weight, *inputs, *outputs, sizes.steps, relu), torch.get_num_threads()
    scratch = torch.empty(
        isa.lib.openwork_dot_product_scratch(isa.kernels, ctypes.byref(call), threads), dtype=torch.uint8, device="cpu"
    )
    call.packed = scratch.data_ptr()
    done(isa.lib.openwork_dot_product(isa.kernels, ctypes.byref(call), DTYPES[values.dtype], threads))


@functools.cache
def warn_of_reference() -> None:
    """Once: the references unpack the weight at every call."""
    warnings.warn(
        "a layer packed for dot products runs where there are none, slowly: deploy again here, or unpickle the model "
        "here, which packs it anew",
        stacklevel=outside(),
    )
