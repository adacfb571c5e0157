"""Matmuls with a compressed weight as operators: schema, reference, fake kernel. `openwork.kernels` has faster ones.

One operator a layout, all with the same arguments. `packed` and `numbers` are the tensors and integers of the layout
(`openwork.layouts`), so that a compiler or an exporter can carry it; `geometry` is that of the convolution. `relu` is
applied to the result, which has the dtype of `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.layouts import DotProduct, Gemm, Gemv, SkinnyExpand, SkinnyGather
from openwork.layouts.conv import ConvGeometry, from_conv_rows
from openwork.layouts.layout import numbers_of
from openwork.nm.quantize import quantize_to_whole
from openwork.ops.library import library, reference

_PACKED = "Tensor x, Tensor[] packed, Tensor? bias, int[] numbers"


def linear(
    kind: Any,
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    numbers: Sequence[int],
    relu: bool,
) -> Tensor:
    """The reference of every kind: (..., K) to (..., O) by the dense weight, in float32."""
    layout = kind.of(packed, numbers)
    layout.check_contents()
    scales, flat = getattr(layout, "scales", None), x.reshape(-1, x.shape[-1]).float()
    weight, added = layout.unpack(), None if bias is None else bias.float()
    if scales is None:
        y = F.linear(flat, weight.float(), added)
    else:
        whole, input_scales = quantize_to_whole(flat) if len(flat) else (flat, flat.new_empty(0))
        sums = F.linear(whole.double(), weight.double()).float()  # whole numbers below 2**53: exact
        y = sums * (input_scales[:, None] * scales) + (0 if added is None else added)
    return (y.relu() if relu else y).reshape(*x.shape[:-1], len(weight)).to(x.dtype)


def conv2d(
    kind: Any,
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    numbers: Sequence[int],
    geometry: Sequence[int],
    relu: bool,
) -> Tensor:
    """(N, C, H, W) to (N, O, ., .) by the dense weight, in float32."""
    layout, form = kind.of(packed, numbers), ConvGeometry.of(geometry)
    layout.check_contents()
    rest = (form.stride, form.padding, form.dilation, form.groups)
    image, scales = x.float(), layout.scales
    weight = from_conv_rows(layout.unpack(), x.shape[1] // form.groups, form.kernel)
    if scales is None:
        y = F.conv2d(image, weight.float(), bias, *rest)
    else:
        whole, input_scales = quantize_to_whole(image) if len(image) else (image, image.new_empty(0))
        sums = F.conv2d(whole.double(), weight.double(), None, *rest).float()
        y = sums * (input_scales[:, None] * scales)[..., None, None] + (0 if bias is None else bias[:, None, None])
    y = (y.relu() if relu else y).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether an image batch lies in memory with its channels last, and in no other order as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _fake_linear(kind: Any, x: Tensor, packed: Any, bias: Any, numbers: Any, relu: bool) -> Any:
    _check_one_device(x, *packed, bias)
    return x.new_empty(*x.shape[:-1], numbers_of(kind, numbers).outputs)


def _fake_conv2d(kind: Any, x: Tensor, packed: Any, bias: Any, numbers: Any, geometry: Any, relu: bool) -> Tensor:
    _check_one_device(x, *packed, bias)
    size = ConvGeometry.of(geometry).output_size(x.shape[2], x.shape[3])
    y = x.new_empty(x.shape[0], numbers_of(kind, numbers).outputs, *size)
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y


def _check_one_device(*tensors: Tensor | None) -> None:
    devices = {str(each.device) for each in tensors if each is not None}
    if len(devices) > 1:
        raise ValueError(f"the input and the packed weight are on {', '.join(sorted(devices))}; needed one device")


def _define(kind: Any, name: str, more: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    library.define(f"{name}({_PACKED}{more}, bool relu) -> Tensor")
    reference(name)(partial(function, kind))
    torch.library.register_fake(f"openwork::{name}", partial(fake, kind), lib=library)


for each in (Gemm, Gemv, DotProduct, SkinnyGather, SkinnyExpand):
    _define(each, f"{each.name}_linear", "", linear, _fake_linear)
for each in (Gemm, DotProduct):
    _define(each, f"{each.name}_conv2d", ", int[] geometry", conv2d, _fake_conv2d)
