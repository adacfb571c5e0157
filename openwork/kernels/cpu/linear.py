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
from openwork.kernels.cpu.native import DTYPES, address, library
from openwork.layouts import DotProduct, Gemm, Gemv
from openwork.nm.quantize import quantize_to_whole
from openwork.ops import sparse_matmul as reference


def gemm_linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool, checked: bool = False
) -> Tensor:
    lib = library()
    if lib is None:
        return reference.linear(Gemm, x, packed, bias, numbers, relu)
    weight, named = checks.gemm_weight(packed, bias, numbers, checked)
    flat, O = checks.rows_of(x, named.inputs), named.outputs
    y = flat.new_empty(len(flat), O)
    if y.numel():
        call = native.GemmLinear(weight, flat.data_ptr(), y.data_ptr(), None, len(flat), flat.stride(0), O, relu)
        scratch = flat.new_empty(lib.openwork_gemm_linear_scratch(ctypes.byref(call)), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        lib.openwork_gemm_linear(ctypes.byref(call))
    return y.view(*x.shape[:-1], O)


def gemv_linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool, checked: bool = False
) -> Tensor:
    lib = library()
    if lib is None:
        return reference.linear(Gemv, x, packed, bias, numbers, relu)
    values, indices, scales = checks.split(packed)
    sizes = checks.check_gemv(values, indices, scales, bias, numbers)
    flat, O = checks.rows_of(x, sizes.numbers.inputs), sizes.numbers.outputs
    B, short = flat.shape[0], -sizes.numbers.inputs % sizes.window
    y = flat.new_empty(B, O)
    if not B:
        return y.view(*x.shape[:-1], O)
    layout = (values.data_ptr(), indices.data_ptr(), sizes.windows, sizes.blocks, sizes.window, sizes.slots)
    if scales is None:
        flat = F.pad(flat, (0, short)) if short else flat
        given = (flat.data_ptr(), flat.stride(0), address(bias), y.data_ptr())
        lib.openwork_gemv(ctypes.byref(native.GemvCall(*layout, *given, O, O, B, relu)), DTYPES[values.dtype])
    else:
        whole, input_scales = quantize_to_whole(flat)
        whole = F.pad(whole, (0, short)).int() & 0xFFFF  # the kernel multiplies pairs of int16
        given = (whole.data_ptr(), whole.stride(0), None, y.data_ptr())
        lib.openwork_gemv(ctypes.byref(native.GemvCall(*layout, *given, O, O, B, False)), DTYPES[torch.int8])
        y = y.view(torch.int32).float().mul_(input_scales[:, None] * scales)
        y = y if bias is None else y.add_(bias)
        y = y.relu_() if relu else y
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


def dot_product_linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool, checked: bool = False
) -> Tensor:
    if not has_dot_product():
        warn_of_reference()
        return reference.linear(DotProduct, x, packed, bias, numbers, relu)
    sizes = checks.check_dot_product(packed, bias, numbers)
    O, int8 = sizes.numbers.outputs, len(packed) == 3
    flat = checks.rows_of(x, sizes.numbers.inputs, torch.float32 if int8 else torch.bfloat16)
    y = flat.new_empty(len(flat), O)
    run_dot_product(packed, bias, sizes, flat, None, flat.new_empty(len(flat)), y, relu)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


def run_dot_product(
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
    lib, (values, indices, scales) = library(), checks.split(packed)
    O, K = sizes.numbers.outputs, sizes.numbers.inputs
    weight = (values.data_ptr(), indices.data_ptr(), sizes.windows, sizes.blocks)
    where = ctypes.addressof(pixels) if pixels is not None else None
    inputs = (x.data_ptr(), x.stride(0), K, where, None, 0)
    outputs = (address(bias), address(scales), x_scales.data_ptr(), y.data_ptr(), O, O, y.numel() // O)
    call, threads = native.DotProductCall(*weight, *inputs, *outputs, sizes.steps, relu), torch.get_num_threads()
    scratch = torch.empty(
        lib.openwork_dot_product_scratch(ctypes.byref(call), threads), dtype=torch.uint8, device="cpu"
    )
    call.packed = scratch.data_ptr()
    lib.openwork_dot_product(ctypes.byref(call), DTYPES[values.dtype], threads)


def has_dot_product() -> bool:
    lib = library()
    return bool(lib and lib.openwork_has_dot_product())


@functools.cache
def warn_of_reference() -> None:
    """Once: the references unpack the weight at every call."""
    warnings.warn(
        "a layer packed for dot products runs where there are none, slowly: deploy again here, or unpickle the model "
        "here, which packs it anew",
        stacklevel=2,
    )
