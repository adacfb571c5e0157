"""Products with a compressed weight on the native library."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.native import DTYPES, ConvCall, LinearCall, PanelWeight, Rows, address, library
from openwork.layout import WINDOWS, index_bits, slots_of
from openwork.ops import products as reference
from openwork.ops.products import channels_last, conv_size, quantized_rows
from openwork.pattern import Pattern


def panel_columns() -> int:
    """Columns that the panel kernel takes at once on the instruction set in use; 64 without the native library."""
    lib = library()
    return lib.openwork_panel_columns() if lib else 64


def lanes() -> int:
    """float32 in a vector of the instruction set in use; 8 without the native library."""
    lib = library()
    return lib.openwork_lanes() if lib else 8


def panel_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    relu: bool,
) -> Tensor:
    lib = library()
    if lib is None:
        return reference.panel_linear(x, values, positions, scales, bias, layout, relu)
    O, K = layout[4:6]
    flat = _rows_of(x, K)
    y = torch.empty(len(flat), O)
    if y.numel():
        weight = _panel_weight(values, positions, scales, bias, layout)
        call = LinearCall(weight, flat.data_ptr(), y.data_ptr(), None, len(flat), flat.stride(0), O, relu)
        scratch = torch.empty(lib.openwork_linear_scratch(ctypes.byref(call)), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        lib.openwork_linear(ctypes.byref(call))
    return y.view(*x.shape[:-1], O)


def rows_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    relu: bool,
) -> Tensor:
    lib = library()
    if lib is None:
        return reference.rows_linear(x, values, positions, scales, bias, layout, relu)
    n, m, packed_lanes, O, K = layout
    window = WINDOWS[m]
    windows, slots, blocks = -(-K // window), window // m * n, -(-O // packed_lanes)
    _demand_lanes(packed_lanes, lib.openwork_lanes())
    stored = values.dtype == torch.int8 if scales is not None else values.dtype in (torch.float32, torch.bfloat16)
    _demand(stored and values.numel() == blocks * windows * slots * packed_lanes, "values", values, layout)
    words = blocks * _words(windows, slots, window) * packed_lanes
    _demand(positions.dtype == torch.int32 and positions.numel() == words, "positions", positions, layout)
    _demand_outputs(scales, bias, layout)
    flat = _rows_of(x, K)
    B = flat.shape[0]
    y = torch.empty(B, O)
    if scales is None and B and O:
        flat = torch.nn.functional.pad(flat, (0, -K % window)) if K % window else flat
        given = (
            values.data_ptr(),
            positions.data_ptr(),
            windows,
            blocks,
            window,
            slots,
            flat.data_ptr(),
            flat.stride(0),
        )
        call = Rows(*given, address(bias), y.data_ptr(), O, O, B, relu)
        lib.openwork_rows(ctypes.byref(call), DTYPES[values.dtype])
    elif scales is not None and B and O:
        whole, input_scales = quantized_rows(flat)
        whole = torch.nn.functional.pad(whole, (0, -K % window)).int() & 0xFFFF  # the kernel multiplies pairs of int16
        given = (
            values.data_ptr(),
            positions.data_ptr(),
            windows,
            blocks,
            window,
            slots,
            whole.data_ptr(),
            whole.stride(0),
        )
        call = Rows(*given, None, y.data_ptr(), O, O, B, False)
        lib.openwork_rows(ctypes.byref(call), DTYPES[torch.int8])
        y = y.view(torch.int32).float().mul_(input_scales[:, None] * scales)
        y = y if bias is None else y.add_(bias)
        y = y.relu_() if relu else y
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


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
    lib = library()
    if lib is None:
        rest = (kernel, stride, padding, dilation, groups, relu)
        return reference.panel_conv2d(x, values, positions, scales, bias, layout, *rest)
    m, O, K = layout[1], *layout[4:]
    channels = x.shape[1] // groups if x.ndim == 4 else 0
    if x.ndim != 4 or -(-channels // m) * m * math.prod(kernel) != K or channels * groups != x.shape[1] or O % groups:
        raise ValueError(f"input {tuple(x.shape)} for a kernel {kernel}, {groups} groups and {K} inputs of each output")
    if x.dtype != torch.float32:
        raise ValueError(f"input of {x.dtype}; needed float32")
    size = [conv_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if min(size) < 1:
        raise ValueError(f"input {tuple(x.shape)} is smaller than the kernel {kernel} with padding {padding}")
    last, input_scales = channels_last(x), None
    if scales is not None and x.numel():
        whole, input_scales = quantized_rows(x)
        x = whole.to(torch.int16)
    x, y = x.contiguous(), torch.empty(len(x), O, *size)
    if y.numel():
        weight = _panel_weight(values, positions, scales, bias, layout)
        shape = (len(x), channels, *x.shape[2:], *size)
        if kernel == stride == [1, 1] and padding == [0, 0]:
            shape = (len(x), channels, 1, math.prod(size), 1, math.prod(size))  # the whole image is one row
        geometry = (groups, *stride, *padding, *dilation, kernel[1], relu)
        addresses = (x.data_ptr(), address(input_scales), y.data_ptr(), None)
        call = ConvCall(weight, *addresses, torch.get_num_threads(), *shape, *geometry)
        scratch = torch.empty(lib.openwork_conv_scratch(ctypes.byref(call)), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        lib.openwork_conv(ctypes.byref(call))
    return y.contiguous(memory_format=torch.channels_last) if last else y


def _panel_weight(
    values: Tensor, positions: Tensor, scales: Tensor | None, bias: Tensor | None, layout: list[int]
) -> PanelWeight:
    n, m, tile, columns, O, K = layout
    _demand_lanes(columns, panel_columns())
    stored = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int16: torch.int8}
    _demand(values.dtype in stored and (values.dtype == torch.int16) == (scales is not None), "values", values, layout)
    dtype = stored[values.dtype]
    padded = -(-K // m) * m
    parts = (min(tile, padded - start) for start in range(0, padded, tile))
    slots = sum(slots_of(inputs, Pattern(n, m), dtype == torch.int8)[1] for inputs in parts)
    _demand(len(values) == slots * O, "values", values, layout)
    _demand(positions.dtype == torch.int16 and len(positions) == len(values) + 1, "positions", positions, layout)
    _demand_outputs(scales, bias, layout)
    addresses = (values.data_ptr(), positions.data_ptr(), address(scales), address(bias))
    return PanelWeight(*addresses, DTYPES[dtype], n, m, tile, K, O)


def _words(windows: int, slots: int, window: int) -> int:
    in_word = 32 // index_bits(window)
    return windows * -(-slots // in_word) if slots > in_word else -(-windows // (in_word // slots))


def _rows_of(x: Tensor, K: int) -> Tensor:
    """(..., K) -> (B, K), rows contiguous."""
    if x.ndim == 0 or x.shape[-1] != K or x.dtype != torch.float32:
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype}; needed float32 (..., {K})")
    flat = x if x.ndim == 2 else x.reshape(-1, K)
    return flat if flat.is_contiguous() or (flat.stride(1) == 1 and flat.stride(0) >= K) else flat.contiguous()


def _demand_lanes(packed: int, here: int) -> None:
    if packed != here:
        raise RuntimeError(
            f"the weight is packed for vectors of another size ({packed}, here {here}): it comes from a machine or an "
            "OPENWORK_ISA with another instruction set; deploy again, or load the finalized model and deploy it here"
        )


def _demand_outputs(scales: Tensor | None, bias: Tensor | None, layout: list[int]) -> None:
    """What there is one of for each output."""
    O = layout[-2]
    for name, each in (("bias", bias), ("scales", scales)):
        _demand(each is None or (each.dtype == torch.float32 and each.numel() == O), name, each, layout)


def _demand(holds: bool, what: str, found: Tensor | None, layout: list[int]) -> None:
    if not holds:
        shape = None if found is None else f"{tuple(found.shape)} of {found.dtype}"
        raise ValueError(f"{what} {shape} do not fit the layout {layout}: make them with openwork.layout")


def register(operators: Any) -> None:
    """Register them for the CPU on the library that `openwork.ops` opened."""
    for function in (panel_linear, rows_linear, panel_conv2d):
        operators.impl(function.__name__, function, "CPU")
