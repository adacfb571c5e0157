"""Products with a compressed weight as operators: schema, reference, fake kernel. `openwork.kernels` has faster ones.

A layout travels as its tensors and a list of numbers, so that a compiler or an exporter can carry it. Inputs and
outputs are float32, but for those of dots with bfloat16 weights, where they are bfloat16; the callers
(`openwork.inference.layers`) cast. `relu` is applied to the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.layouts.layout import Dots, Panel, Rows, from_conv_rows, from_dots, from_panel, from_rows
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_to_whole
from openwork.ops.library import library

_LAYOUT = "Tensor values, Tensor positions, Tensor? scales, Tensor? bias, int[] layout"
library.define(f"panel_linear(Tensor x, {_LAYOUT}, bool relu) -> Tensor")
library.define(f"rows_linear(Tensor x, {_LAYOUT}, bool relu) -> Tensor")
library.define(f"dots_linear(Tensor x, {_LAYOUT}, bool relu) -> Tensor")
library.define(
    f"panel_conv2d(Tensor x, {_LAYOUT}, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool relu) -> Tensor"
)
library.define(
    f"dots_conv2d(Tensor x, {_LAYOUT}, int[] kernel, int[] stride, int[] padding, int[] dilation, bool relu) -> Tensor"
)


def panel_numbers(layout: Panel) -> list[int]:
    """The numbers of a layout, for the operators: n, m, tile, columns, then the shape of the weight."""
    return [layout.pattern.n, layout.pattern.m, layout.tile, layout.columns, *layout.shape]


def rows_numbers(layout: Rows | Dots) -> list[int]:
    """n, m, lanes, then the shape of the weight."""
    return [layout.pattern.n, layout.pattern.m, layout.lanes, *layout.shape]


def panel_of(values: Tensor, positions: Tensor, scales: Tensor | None, numbers: list[int]) -> Panel:
    n, m, tile, columns, O, K = numbers
    return Panel(values, positions, scales, Pattern(n, m), (O, K), tile, columns)


def rows_of(values: Tensor, words: Tensor, scales: Tensor | None, numbers: list[int]) -> Rows:
    n, m, lanes, O, K = numbers
    return Rows(values, words, scales, Pattern(n, m), (O, K), lanes)


def dots_of(values: Tensor, positions: Tensor, scales: Tensor | None, numbers: list[int]) -> Dots:
    n, m, lanes, O, K = numbers
    return Dots(values, positions, scales, Pattern(n, m), (O, K), lanes)


@torch.library.impl(library, "panel_linear", "CompositeExplicitAutograd")
def panel_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    relu: bool,
) -> Tensor:
    return _linear(x, from_panel(panel_of(values, positions, scales, layout)), scales, bias, relu)


@torch.library.impl(library, "rows_linear", "CompositeExplicitAutograd")
def rows_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    relu: bool,
) -> Tensor:
    return _linear(x, from_rows(rows_of(values, positions, scales, layout)), scales, bias, relu)


@torch.library.impl(library, "dots_linear", "CompositeExplicitAutograd")
def dots_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    relu: bool,
) -> Tensor:
    return _linear(x.float(), from_dots(dots_of(values, positions, scales, layout)), scales, bias, relu).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if scales is None:
        y = F.linear(flat, weight.float(), bias)
    else:
        whole, input_scales = quantize_to_whole(flat) if len(flat) else (flat, flat.new_empty(0))
        sums = F.linear(whole.double(), weight.double()).float()  # whole numbers below 2**53: exact
        y = sums * (input_scales[:, None] * scales) + (0 if bias is None else bias)
    return (y.relu() if relu else y).reshape(*x.shape[:-1], len(weight))


@torch.library.impl(library, "panel_conv2d", "CompositeExplicitAutograd")
def panel_conv2d(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    rows = from_panel(panel_of(values, positions, scales, layout))
    return _conv2d(x, rows, scales, bias, kernel, stride, padding, dilation, groups, relu)


@torch.library.impl(library, "dots_conv2d", "CompositeExplicitAutograd")
def dots_conv2d(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
) -> Tensor:
    rows = from_dots(dots_of(values, positions, scales, layout))
    return _conv2d(x.float(), rows, scales, bias, kernel, stride, padding, dilation, 1, relu).to(x.dtype)


def _conv2d(
    x: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    weight = from_conv_rows(rows, x.shape[1] // groups, (kernel[0], kernel[1]))
    if scales is None:
        y = F.conv2d(x, weight.float(), bias, stride, padding, dilation, groups)
    else:
        whole, input_scales = quantize_to_whole(x) if len(x) else (x, x.new_empty(0))
        sums = F.conv2d(whole.double(), weight.double(), None, stride, padding, dilation, groups).float()
        y = sums * (input_scales[:, None] * scales)[..., None, None] + (0 if bias is None else bias[:, None, None])
    y = y.relu() if relu else y
    return y.contiguous(memory_format=torch.channels_last) if channels_last(x) else y.contiguous()


@torch.library.register_fake("openwork::panel_linear")
def _(x, values, positions, scales, bias, layout, relu):  # type: ignore[no-untyped-def]
    _check_one_device(x, values, positions, scales, bias)
    return x.new_empty(*x.shape[:-1], layout[4])


@torch.library.register_fake("openwork::rows_linear")
def _(x, values, positions, scales, bias, layout, relu):  # type: ignore[no-untyped-def]
    _check_one_device(x, values, positions, scales, bias)
    return x.new_empty(*x.shape[:-1], layout[3])


@torch.library.register_fake("openwork::dots_linear")
def _(x, values, positions, scales, bias, layout, relu):  # type: ignore[no-untyped-def]
    _check_one_device(x, values, positions, scales, bias)
    return x.new_empty(*x.shape[:-1], layout[3])


@torch.library.register_fake("openwork::panel_conv2d")
def _(x, values, positions, scales, bias, layout, kernel, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    _check_one_device(x, values, positions, scales, bias)
    return _fake_conv2d(x, layout[4], kernel, stride, padding, dilation)


@torch.library.register_fake("openwork::dots_conv2d")
def _(x, values, positions, scales, bias, layout, kernel, stride, padding, dilation, relu):  # type: ignore[no-untyped-def]
    _check_one_device(x, values, positions, scales, bias)
    return _fake_conv2d(x, layout[3], kernel, stride, padding, dilation)


def _fake_conv2d(
    x: Tensor, O: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    size = [conv_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    y = x.new_empty(x.shape[0], O, *size)
    return y.contiguous(memory_format=torch.channels_last) if channels_last(x) else y


def _check_one_device(*tensors: Tensor | None) -> None:
    devices = {str(each.device) for each in tensors if each is not None}
    if len(devices) > 1:
        raise ValueError(f"the input and the packed weight are on {', '.join(sorted(devices))}; needed one device")


def conv_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs of a convolution along one dim.

    >>> conv_size(224, 7, 2, 3, 1)
    112
    """
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def channels_last(x: Tensor) -> bool:
    """Whether an image batch lies in memory with its channels last, and in no other order as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
