"""Products that take bytes and give bytes, so that activations stay int8 from layer to layer.

A byte q, of 0 to 255, stands for (q - zero) * scale. One product, each line rounded once, to float32:

    sum = of (q - zero) * w, exact              w whole numbers of -127 to 127
    y   = sum * scales[o] + bias[o]             scales: that of x times those of the weight
    y   = y + residual                          or, of bytes, (residual - residual_zero) * residual_scale + y
    y   = activation(y)                         none, ReLU, or GELU (exact, by erf)
    q'  = y * (1 / y_scale) + y_zero            to the nearest whole number, ties to even, of 0 to 255; NaN gives 0

The result is y where y_scale is 0. A convolution pads with `zero`. Images and results have their channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.layouts import DotProduct
from openwork.layouts.conv import ConvGeometry, from_conv_rows
from openwork.layouts.layout import numbers_of
from openwork.ops.library import library, reference

NONE, RELU, GELU = range(3)
"""Activations, by the numbers that the operators take."""
MOST_TERMS = 2**31 // (255 * 127) - 1
"""Kept weights of one output, at most: sums of products have 32 bits."""


_PRODUCT = "Tensor x, Tensor[] packed, Tensor[] outputs, int[] numbers, Tensor? residual, int[] whole, float[] scales"
library.define("to_bytes(Tensor x, float scale, int zero) -> Tensor")
library.define("from_bytes(Tensor x, float scale, int zero) -> Tensor")
library.define(f"bytes_linear({_PRODUCT}) -> Tensor")
library.define(f"bytes_conv2d({_PRODUCT}, int[] geometry) -> Tensor")


class Form(NamedTuple):
    """What a product does around its sums, beside numbers of each output."""

    zero: int = 0
    residual_zero: int = 0
    y_zero: int = 0
    activation: int = NONE
    residual_scale: float = 1.0
    y_scale: float = 0.0

    @property
    def arguments(self) -> tuple[list[int], list[float]]:
        """As the operators take it."""
        return list(self[:4]), list(self[4:])


def form_of(whole: Sequence[int], scales: Sequence[float]) -> Form:
    """The inverse of `arguments`. Raises ValueError where they are none."""
    if len(whole) != 4 or len(scales) != 2:
        raise ValueError(f"{list(whole)}, {list(scales)}; needed three zero points and an activation, and two scales")
    form = Form(*whole, *scales)
    if not all(0 <= each <= 255 for each in form[:3]) or form.activation not in (NONE, RELU, GELU):
        raise ValueError(f"zero points {list(form[:3])} of 0 to 255, activation {form.activation} of 0 to 2")
    return form


@reference("to_bytes")
def to_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    """float32 as bytes; images with their channels last."""
    whole = _fma(x, _inverse(scale), torch.tensor(float(zero)))
    bytes_ = whole.round().nan_to_num(0.0).clamp(0, 255).to(torch.uint8)
    return bytes_.contiguous(memory_format=_format(x))


@reference("from_bytes")
def from_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    """Bytes as float32; images with their channels last."""
    return ((x.float() - zero) * torch.tensor(scale)).contiguous(memory_format=_format(x))


@reference("bytes_linear")
def bytes_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[int],
    residual: Tensor | None,
    whole: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """(..., K) bytes to (..., O). `outputs`: scales and bias float32, sums of weights int32."""
    form, layout = form_of(whole, scales), _layout(packed, numbers)
    flat = x.reshape(-1, x.shape[-1]).double() - form.zero
    sums = F.linear(flat, layout.unpack().double())
    each, bias = outputs[0], outputs[1]
    added = None if residual is None else residual.reshape(-1, len(each))
    return _finished(sums, each, bias, added, form).reshape(*x.shape[:-1], len(each))


@reference("bytes_conv2d")
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
    """(N, C, H, W) bytes to (N, O, ., .). `outputs` as of `bytes_linear`."""
    form, layout, conv = form_of(whole, scales), _layout(packed, numbers), ConvGeometry.of(geometry)
    weight = from_conv_rows(layout.unpack(), x.shape[1], conv.kernel).double()
    sums = F.conv2d(x.double() - form.zero, weight, None, conv.stride, conv.padding, conv.dilation)
    each, bias = (one[:, None, None] for one in outputs[:2])
    return _finished(sums, each, bias, residual, form).contiguous(memory_format=torch.channels_last)


def _layout(packed: Sequence[Tensor], numbers: Sequence[int]) -> DotProduct:
    layout = DotProduct.of(packed, numbers)
    layout.check_contents()
    assert isinstance(layout, DotProduct)
    return layout


def _finished(sums: Tensor, scales: Tensor, bias: Tensor, residual: Tensor | None, form: Form) -> Tensor:
    y = _fma(sums.float(), scales, bias)
    if residual is not None and residual.dtype == torch.uint8:
        y = _fma(residual.float() - form.residual_zero, torch.tensor(form.residual_scale), y)
    elif residual is not None:
        y = y + residual
    if form.activation == RELU:
        y = y.relu()
    elif form.activation == GELU:
        y = F.gelu(y.double()).float()
    return to_bytes(y, form.y_scale, form.y_zero) if form.y_scale else y


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once (but for the rarest sums, that double rounds first)."""
    return (a.double() * b.double() + c.double()).float()


def _inverse(scale: float) -> Tensor:
    return torch.tensor(1.0 / scale, dtype=torch.float32)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def _fake_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=_format(x))


def _fake_floats(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=_format(x))


def _fake_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[int],
    residual: Tensor | None,
    whole: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    dtype = torch.uint8 if scales[1] else torch.float32
    return x.new_empty(*x.shape[:-1], numbers_of(DotProduct, numbers).outputs, dtype=dtype)


def _fake_conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[int],
    residual: Tensor | None,
    whole: Sequence[int],
    scales: Sequence[float],
    geometry: Sequence[int],
) -> Tensor:
    size = ConvGeometry.of(geometry).output_size(x.shape[2], x.shape[3])
    dtype = torch.uint8 if scales[1] else torch.float32
    y = x.new_empty(x.shape[0], numbers_of(DotProduct, numbers).outputs, *size, dtype=dtype)
    return y.contiguous(memory_format=torch.channels_last)


for _name, _fake in (
    ("to_bytes", _fake_bytes),
    ("from_bytes", _fake_floats),
    ("bytes_linear", _fake_linear),
    ("bytes_conv2d", _fake_conv2d),
):
    torch.library.register_fake(f"openwork::{_name}", _fake, lib=library)
