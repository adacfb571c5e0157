"""Products with a compressed weight on the native library."""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cpu.native import (
    DTYPES,
    DotProduct,
    GemmConv2d,
    GemmLinear,
    GemmWeight,
    Gemv,
    Pixels,
    address,
    library,
)
from openwork.layouts.layout import WINDOWS, dots_sizes, index_bits, slots_of
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_to_whole
from openwork.ops import sparse_matmul as reference
from openwork.ops.sparse_matmul import channels_last, conv_size


def panel_columns() -> int:
    """Columns that the panel kernel takes at once on the instruction set in use; 64 without the native library."""
    lib = library()
    return lib.openwork_gemm_columns() if lib else 64


def lanes() -> int:
    """float32 in a vector of the instruction set in use; 8 without the native library."""
    lib = library()
    return lib.openwork_lanes() if lib else 8


def has_dots() -> bool:
    """Whether the instruction set in use multiplies pairs of bfloat16 and quads of int8 (`layouts.layout.dots`)."""
    lib = library()
    return bool(lib and lib.openwork_has_dot_product())


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
    weight = _panel_weight(values, positions, scales, bias, layout)
    O, K = layout[4:]
    flat = _rows_of(x, K)
    y = flat.new_empty(len(flat), O)
    if y.numel():
        call = GemmLinear(weight, flat.data_ptr(), y.data_ptr(), None, len(flat), flat.stride(0), O, relu)
        scratch = flat.new_empty(lib.openwork_gemm_linear_scratch(ctypes.byref(call)), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        lib.openwork_gemm_linear(ctypes.byref(call))
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
    stored = values.dtype == torch.int8 if scales is not None else values.dtype in (torch.float32, torch.bfloat16)
    sizes = _rows_sizes(tuple(layout), values.dtype == torch.bfloat16)
    _check_lanes(layout[2], lib.openwork_lanes())
    _check(stored and _whole(values, sizes.values), "values", values, layout)
    _check(positions.dtype == torch.int32 and _whole(positions, sizes.words), "positions", positions, layout)
    _check_outputs(scales, bias, layout)
    windows, blocks, window, slots = sizes.windows, sizes.blocks, sizes.window, sizes.slots
    O, K = layout[3:]
    flat = _rows_of(x, K)
    B = flat.shape[0]
    y = flat.new_empty(B, O)
    if scales is None and B:
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
        call = Gemv(*given, address(bias), y.data_ptr(), O, O, B, relu)
        lib.openwork_gemv(ctypes.byref(call), DTYPES[values.dtype])
    elif scales is not None and B:
        whole, input_scales = quantize_to_whole(flat)
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
        call = Gemv(*given, None, y.data_ptr(), O, O, B, False)
        lib.openwork_gemv(ctypes.byref(call), DTYPES[torch.int8])
        y = y.view(torch.int32).float().mul_(input_scales[:, None] * scales)
        y = y if bias is None else y.add_(bias)
        y = y.relu_() if relu else y
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


def dots_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    relu: bool,
) -> Tensor:
    lib = library()
    if lib is None or not lib.openwork_has_dot_product():
        _say_slow()
        return reference.dots_linear(x, values, positions, scales, bias, layout, relu)
    sizes = _check_dots(lib, values, positions, scales, bias, layout)
    O, K = layout[3:]
    flat = _rows_of(x, K, torch.float32 if scales is not None else torch.bfloat16)
    y = flat.new_empty(len(flat), O)
    _run_dots(lib, values, positions, scales, bias, layout, sizes, flat, None, flat.new_empty(len(flat)), y, relu)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], O)


def _run_dots(
    lib: Any,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
    sizes: _DotsSizes,
    x: Tensor,
    pixels: Pixels | None,
    x_scales: Tensor,
    y: Tensor,
    relu: bool,
) -> None:
    """Into y, rows of outputs. `x_scales` float32, given for `pixels`, else written."""
    if not y.numel():
        return
    O, K = layout[3:]
    weight = (values.data_ptr(), positions.data_ptr(), sizes.windows, sizes.blocks)
    where = ctypes.addressof(pixels) if pixels is not None else None
    inputs = (x.data_ptr(), x.stride(0), K, where, None, 0)
    outputs = (address(bias), address(scales), x_scales.data_ptr(), y.data_ptr(), O, O, y.numel() // O)
    call, threads = DotProduct(*weight, *inputs, *outputs, sizes.steps, relu), torch.get_num_threads()
    packed = torch.empty(lib.openwork_dot_product_scratch(ctypes.byref(call), threads), dtype=torch.uint8, device="cpu")
    call.packed = packed.data_ptr()
    lib.openwork_dot_product(ctypes.byref(call), DTYPES[values.dtype], threads)


@functools.cache
def _say_slow() -> None:
    """Once: the references unpack the weight at every call."""
    warnings.warn(
        "a layer packed for dot products runs where there are none, slowly: deploy again here, or unpickle the model "
        "here, which packs it anew",
        stacklevel=2,
    )


def _check_dots(
    lib: Any,
    values: Tensor,
    positions: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    layout: list[int],
) -> _DotsSizes:
    sizes = _dots_sizes(tuple(layout), values.dtype)
    _check_lanes(layout[2], lib.openwork_lanes())
    _check(
        (values.dtype == torch.int8) == (scales is not None) and _whole(values, sizes.values), "values", values, layout
    )
    _check(positions.dtype == torch.uint8 and _whole(positions, sizes.positions), "positions", positions, layout)
    _check_outputs(scales, bias, layout)
    return sizes


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
    lib = library()
    if lib is None or not lib.openwork_has_dot_product():
        _say_slow()
        rest = (kernel, stride, padding, dilation, relu)
        return reference.dots_conv2d(x, values, positions, scales, bias, layout, *rest)
    sizes = _check_dots(lib, values, positions, scales, bias, layout)
    _check_geometry(kernel, stride, padding, dilation)
    m, O, K = layout[1], *layout[3:]
    channels = -(-x.shape[1] // m) * m if x.ndim == 4 else 0
    if channels * math.prod(kernel) != K:
        raise ValueError(f"input {tuple(x.shape)} for a kernel {kernel} and {K} inputs of each output")
    if x.dtype != (needed := torch.bfloat16 if scales is None else torch.float32):
        raise ValueError(f"input of {x.dtype}; needed {needed}")
    size = _output_size(x, kernel, stride, padding, dilation)
    images = x.permute(0, 2, 3, 1)
    images = torch.nn.functional.pad(images, (0, channels - x.shape[1])) if channels > x.shape[1] else images
    images, x_scales = images.contiguous(), x.new_ones(len(x), dtype=torch.float32)
    if scales is not None and images.numel():
        whole, count = torch.empty_like(images, dtype=torch.uint8), images[0].numel()
        bits = torch.empty(len(x) * (count // 2**14 + 1), dtype=torch.int32, device="cpu")
        lib.openwork_quantize(images.data_ptr(), len(x), count, whole.data_ptr(), x_scales.data_ptr(), bits.data_ptr())
        images = whole
    pixels = Pixels(channels, *x.shape[2:], *size, *stride, *padding, *dilation, kernel[1])
    y = x.new_empty(len(x), *size, O)
    _run_dots(lib, values, positions, scales, bias, layout, sizes, images, pixels, x_scales, y, relu)
    y = y.permute(0, 3, 1, 2)
    return y if channels_last(x) else y.contiguous()


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
    weight = _panel_weight(values, positions, scales, bias, layout)
    _check_geometry(kernel, stride, padding, dilation)
    m, O, K = layout[1], *layout[4:]
    channels = x.shape[1] // groups if x.ndim == 4 and groups > 0 else 0
    if not channels or -(-channels // m) * m * math.prod(kernel) != K or channels * groups != x.shape[1] or O % groups:
        raise ValueError(f"input {tuple(x.shape)} for a kernel {kernel}, {groups} groups and {K} inputs of each output")
    if x.dtype != torch.float32:
        raise ValueError(f"input of {x.dtype}; needed float32")
    size = _output_size(x, kernel, stride, padding, dilation)
    last, input_scales = channels_last(x), None
    if scales is not None and x.numel():
        whole, input_scales = quantize_to_whole(x)
        x = whole.to(torch.int16)
    x, y = x.contiguous(), x.new_empty(len(x), O, *size, dtype=torch.float32)
    if y.numel():
        shape = (len(x), channels, *x.shape[2:], *size)
        if kernel == stride == [1, 1] and padding == [0, 0]:
            shape = (len(x), channels, 1, math.prod(size), 1, math.prod(size))  # the whole image is one row
        geometry = (groups, *stride, *padding, *dilation, kernel[1], relu)
        addresses = (x.data_ptr(), address(input_scales), y.data_ptr(), None)
        call = GemmConv2d(weight, *addresses, torch.get_num_threads(), *shape, *geometry)
        scratch = x.new_empty(lib.openwork_gemm_conv2d_scratch(ctypes.byref(call)), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        lib.openwork_gemm_conv2d(ctypes.byref(call))
    return y.contiguous(memory_format=torch.channels_last) if last else y


def _panel_weight(
    values: Tensor, positions: Tensor, scales: Tensor | None, bias: Tensor | None, layout: list[int]
) -> GemmWeight:
    stored = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int16: torch.int8}
    _check(values.dtype in stored and (values.dtype == torch.int16) == (scales is not None), "values", values, layout)
    dtype, numbers = stored[values.dtype], tuple(layout)
    slots = _panel_slots(numbers, dtype == torch.int8)
    n, m, tile, columns, O, K = numbers
    _check_lanes(columns, panel_columns())
    _check(_whole(values, slots), "values", values, layout)
    _check(positions.dtype == torch.int16 and _whole(positions, slots + 1), "positions", positions, layout)
    _check_outputs(scales, bias, layout)
    _check_positions(positions, numbers, dtype == torch.int8)
    addresses = (values.data_ptr(), positions.data_ptr(), address(scales), address(bias))
    return GemmWeight(*addresses, DTYPES[dtype], n, m, tile, K, O)


@functools.lru_cache(maxsize=4096)
def _panel_slots(numbers: tuple[int, ...], int8: bool) -> int:
    """How many values a panel layout stores. Raises ValueError where the numbers are those of none."""
    if len(numbers) != 6:
        raise ValueError(f"layout {list(numbers)}; needed n, m, tile, columns, outputs, inputs")
    n, m, tile, columns, O, K = numbers
    pattern, row = Pattern(n, m), columns * (2 if int8 else 4)
    if min(O, K) < 1 or tile < m or tile % m or (tile - 1) * row >= 2**16:
        raise ValueError(f"{list(numbers)} makes no layout: make it with openwork.layouts.layout")
    tiles, rest = divmod(-(-K // m) * m, tile)
    return O * (tiles * slots_of(tile, pattern, int8)[1] + slots_of(rest, pattern, int8)[1])


@dataclass(frozen=True)
class _RowsSizes:
    window: int
    slots: int
    windows: int
    blocks: int
    values: int
    words: int


@functools.lru_cache(maxsize=4096)
def _rows_sizes(numbers: tuple[int, ...], paired: bool) -> _RowsSizes:
    """What a rows layout consists of, its values `paired` or not. Raises ValueError where the numbers make none."""
    if len(numbers) != 5:
        raise ValueError(f"layout {list(numbers)}; needed n, m, lanes, outputs, inputs")
    n, m, lanes, O, K = numbers
    pattern = Pattern(n, m)
    if m not in WINDOWS or min(O, K, lanes) < 1:
        raise ValueError(f"{list(numbers)} makes no layout by rows: make it with openwork.layouts.layout")
    window = WINDOWS[m]
    windows, slots, blocks = -(-K // window), window // m * pattern.n, -(-O // lanes)
    words = blocks * _words(windows, slots, window) * lanes
    stored = windows * slots + (windows * slots % 2 if paired else 0)
    return _RowsSizes(window, slots, windows, blocks, blocks * stored * lanes, words)


@dataclass(frozen=True)
class _DotsSizes:
    window: int
    steps: int
    windows: int
    blocks: int
    values: int
    positions: int


@functools.lru_cache(maxsize=4096)
def _dots_sizes(numbers: tuple[int, ...], dtype: torch.dtype) -> _DotsSizes:
    """What a dots layout consists of. Raises ValueError where the numbers make none."""
    if len(numbers) != 5:
        raise ValueError(f"layout {list(numbers)}; needed n, m, lanes, outputs, inputs")
    n, m, lanes, O, K = numbers
    if min(O, K, lanes) < 1:
        raise ValueError(f"{list(numbers)} makes no layout by dots: make it with openwork.layouts.layout")
    one = dots_sizes(dtype, Pattern(n, m), lanes)
    windows, blocks = -(-K // one.window), -(-O // lanes)
    in_step = lanes * one.together
    positions = one.steps + one.steps % 2 if dtype == torch.bfloat16 else one.steps
    every = blocks * windows * in_step
    return _DotsSizes(one.window, one.steps, windows, blocks, every * one.steps, every * positions)


# Positions that were found good: id -> a reference to the tensor, and in which state of it. So each is looked at once
# and calls stay free of it. (An attribute of the tensor would travel in pickles, which may come from anyone.)
_good_positions: dict[int, tuple[weakref.ref[Tensor], Any]] = {}


def _check_positions(positions: Tensor, numbers: tuple[int, ...], int8: bool) -> None:
    key, state = id(positions), (_version(positions), positions.data_ptr(), numbers, int8)
    known = _good_positions.get(key)
    if known is not None and known[0]() is positions and known[1] == state:
        return
    _look_at_positions(positions, numbers, int8)
    _good_positions[key] = (weakref.ref(positions, lambda _: _good_positions.pop(key, None)), state)


def _look_at_positions(positions: Tensor, numbers: tuple[int, ...], int8: bool) -> None:
    """Raises ValueError where a position is not that of an input in its tile."""
    n, m, tile, columns, O, K = numbers
    row, padded, at = columns * (2 if int8 else 4), -(-K // m) * m, 0
    for start in range(0, padded, tile):
        inputs = min(tile, padded - start)
        count = O * slots_of(inputs, Pattern(n, m), int8)[1]
        part = positions[at : at + count].int() & 0xFFFF
        wrong = (part >= inputs * row) | (part % row != 0)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"position {at + first} is {int(part[first])}; needed a multiple of {row} below {inputs * row}, a row "
                f"of its tile, for the layout {list(numbers)}: the weight is damaged, make it by openwork.layouts"
            )
        at += count


def _version(tensor: Tensor) -> int | None:
    """Changes with what is in the tensor; inference tensors do not count their changes."""
    return None if tensor.is_inference() else tensor._version


def _check_geometry(kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> None:
    each_least = (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, numbers, least in each_least:
        if len(numbers) != 2 or min(numbers) < least or max(numbers) >= 2**31:
            raise ValueError(f"{name} {numbers}; needed two numbers, of at least {least} and below 2**31")


def _output_size(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    size = [conv_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if min(size) < 1:
        raise ValueError(f"input {tuple(x.shape)} is smaller than the kernel {kernel} with padding {padding}")
    return size


def _words(windows: int, slots: int, window: int) -> int:
    in_word = 32 // index_bits(window)
    return windows * -(-slots // in_word) if slots > in_word else -(-windows // (in_word // slots))


def _rows_of(x: Tensor, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., K) -> (B, K), rows contiguous."""
    if x.ndim == 0 or x.shape[-1] != K or x.dtype != dtype:
        needed = str(dtype).removeprefix("torch.")
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype}; needed {needed} (..., {K})")
    flat = x if x.ndim == 2 else x.reshape(-1, K)
    return flat if flat.is_contiguous() or (flat.stride(1) == 1 and flat.stride(0) >= K) else flat.contiguous()


def _check_lanes(packed: int, here: int) -> None:
    if packed != here:
        raise RuntimeError(
            f"the weight is packed for vectors of another size ({packed}, here {here}): it comes from a machine or an "
            "OPENWORK_ISA with another instruction set; deploy again, or load the finalized model and deploy it here"
        )


def _check_outputs(scales: Tensor | None, bias: Tensor | None, layout: list[int]) -> None:
    """What there is one of for each output."""
    O = layout[-2]
    for name, each in (("bias", bias), ("scales", scales)):
        _check(each is None or (each.dtype == torch.float32 and _whole(each, O)), name, each, layout)


def _whole(tensor: Tensor, count: int) -> bool:
    """Whether a tensor is so many numbers side by side in memory."""
    return tensor.numel() == count and tensor.is_contiguous()


def _check(holds: bool, what: str, found: Tensor | None, layout: list[int]) -> None:
    if not holds:
        shape = None if found is None else f"{tuple(found.shape)} of {found.dtype}"
        raise ValueError(f"{what} {shape} do not fit the layout {layout}: make them with openwork.layouts.layout")
