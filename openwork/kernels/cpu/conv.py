"""Convolutions with a compressed weight on the native library."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.kernels.cpu import checks, native
from openwork.kernels.cpu.linear import run_dot_product, warn_of_reference
from openwork.kernels.cpu.native import Isa, address, done
from openwork.layouts import DotProduct, Gemm
from openwork.nm.quantize import quantize_to_whole
from openwork.ops import sparse_matmul as reference
from openwork.ops.sparse_matmul import is_channels_last


def gemm_conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    numbers: Sequence[int],
    geometry: Sequence[int],
    relu: bool,
) -> Tensor:
    isa = native.isa()
    if isa is None:
        return reference.conv2d(Gemm, x, packed, bias, numbers, geometry, relu)
    weight, named = checks.gemm_weight(isa, packed, bias, numbers)
    form = checks.geometry_of(tuple(geometry))
    channels = checks.check_channels(x, form, named)
    if x.dtype != torch.float32:
        raise ValueError(f"input of {x.dtype}; needed float32")
    size = checks.output_size(x, form)
    last, input_scales = is_channels_last(x), None
    if len(packed) == 3 and x.numel():
        whole, input_scales = quantize_to_whole(x)
        x = whole.to(torch.int16)
    x, y = x.contiguous(), x.new_empty(len(x), named.outputs, *size, dtype=torch.float32)
    if y.numel():
        image = (x.shape[2], x.shape[3])
        if image[1] == form.kernel[1] == 1 and form.padding[1] == 0:  # a column of pixels is a row of them
            form, image, size = form.turned, image[::-1], size[::-1]
        shape = (len(x), channels, *image, *size)
        if form.kernel == form.stride == (1, 1) and form.padding == (0, 0):
            shape = (len(x), channels, 1, math.prod(size), 1, math.prod(size))  # the whole image is one row
        rest = (form.groups, *form.stride, *form.padding, *form.dilation, form.kernel[1], relu)
        addresses = (address(x), address(input_scales), y.data_ptr(), None)
        call = native.GemmConv2d(weight, *addresses, torch.get_num_threads(), *shape, *rest)
        scratch = x.new_empty(isa.lib.openwork_gemm_conv2d_scratch(isa.kernels, ctypes.byref(call)), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        checks.gemm_done(isa.lib.openwork_gemm_conv2d(isa.kernels, ctypes.byref(call)), packed, named)
    return y.contiguous(memory_format=torch.channels_last) if last else y


def dot_product_conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    numbers: Sequence[int],
    geometry: Sequence[int],
    relu: bool,
) -> Tensor:
    isa = native.isa()
    if isa is None or not isa.dot_product:
        warn_of_reference()
        return reference.conv2d(DotProduct, x, packed, bias, numbers, geometry, relu)
    sizes, form = checks.check_dot_product(isa, packed, bias, numbers), checks.geometry_of(tuple(geometry))
    checks.check_channels(x, form, sizes.numbers)
    int8 = len(packed) == 3
    if form.groups != 1:
        raise ValueError(f"a convolution in {form.groups} groups; dot products are for one")
    if x.dtype != (needed := torch.float32 if int8 else torch.bfloat16):
        raise ValueError(f"input of {x.dtype}; needed {needed}")
    size = checks.output_size(x, form)
    short = -x.shape[1] % sizes.numbers.m
    images = x.permute(0, 2, 3, 1)
    images = F.pad(images, (0, short)) if short else images.contiguous()
    x_scales = x.new_ones(len(x), dtype=torch.float32)
    if int8 and images.numel():
        images = _quantized(isa, images, x_scales)
    pixels = native.Pixels(
        images.shape[3], *x.shape[2:], *size, *form.stride, *form.padding, *form.dilation, form.kernel[1]
    )
    y = x.new_empty(len(x), *size, sizes.numbers.outputs)
    run_dot_product(isa, packed, bias, sizes, images, pixels, x_scales, y, relu)
    y = y.permute(0, 3, 1, 2)
    return y if is_channels_last(x) else y.contiguous()


def _quantized(isa: Isa, images: Tensor, scales: Tensor) -> Tensor:
    """Whole numbers plus 128, one scale an image, which is written."""
    whole, count = torch.empty_like(images, dtype=torch.uint8), images[0].numel()
    bits = torch.empty(len(images) * (count // 2**14 + 1), dtype=torch.int32, device="cpu")
    to = (whole.data_ptr(), scales.data_ptr(), bits.data_ptr())
    done(isa.lib.openwork_quantize(isa.kernels, address(images), len(images), count, *to))
    return whole
