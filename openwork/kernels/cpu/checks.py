"""What the native kernels are given, looked at before: dtypes, sizes, memory. Indices they bound themselves.

Each layout has its sizes, a function of its integers and cached by them, and a check that the tensors have these sizes.
Everything raises ValueError, and RuntimeError where the weight is packed for another instruction set.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cpu.native import DTYPES, GemmWeight, Isa, address, done
from openwork.layouts import dot_product, gemm, gemv
from openwork.layouts.conv import ConvGeometry
from openwork.layouts.cpu import WINDOWS
from openwork.layouts.dot_product import DotProduct, DotProductNumbers
from openwork.layouts.gemm import Gemm, GemmNumbers
from openwork.layouts.gemv import Gemv, GemvNumbers
from openwork.layouts.layout import numbers_of
from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted

_GEMM_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int16: torch.int8}


def split(packed: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, offsets or indices, scales."""
    if not 2 <= len(packed) <= 3:
        raise ValueError(
            f"{counted(len(packed), 'tensor')} of a layout; needed values, offsets or indices, and scales of int8"
        )
    return packed[0], packed[1], packed[2] if len(packed) == 3 else None


@functools.lru_cache(maxsize=4096)
def gemm_sizes(numbers: tuple[int, ...], int8: bool) -> tuple[GemmNumbers, int]:
    """The integers by name, and how many values are stored."""
    named = numbers_of(Gemm, numbers)
    return named, gemm.stored_slots(named, int8)


def gemm_weight(
    isa: Isa, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int]
) -> tuple[GemmWeight, GemmNumbers]:
    """The weight as the native library takes it. It looks at the offsets itself."""
    values, offsets, scales = split(packed)
    int8 = values.dtype == torch.int16
    _check(values.dtype in _GEMM_DTYPES and int8 == (scales is not None), "values", values, numbers)
    named, slots = gemm_sizes(tuple(numbers), int8)
    _check_vectors(named.columns, isa.columns)
    _check(_whole(values, slots), "values", values, numbers)
    _check(offsets.dtype == torch.int16 and _whole(offsets, slots + 1), "offsets", offsets, numbers)
    _check_outputs(scales, bias, named.outputs, numbers)
    addresses = (address(values), address(offsets), address(scales), address(bias))
    n, m, tile, _, O, K = named
    return GemmWeight(*addresses, DTYPES[_GEMM_DTYPES[values.dtype]], n, m, tile, K, O), named


def gemm_done(status: int, packed: Sequence[Tensor], numbers: GemmNumbers) -> None:
    """Raises what GEMM says; of damaged offsets, which."""
    if status:
        gemm.check_offsets(packed[1], numbers, len(packed) == 3)
        done(status)


@dataclass(frozen=True)
class GemvSizes:
    numbers: GemvNumbers
    window: int
    slots: int
    windows: int
    blocks: int
    values: int
    indices: int


@functools.lru_cache(maxsize=4096)
def gemv_sizes(numbers: tuple[int, ...], paired: bool) -> GemvSizes:
    """What a GEMV layout consists of, its values `paired` or not."""
    named = numbers_of(Gemv, numbers)
    n, m, lanes, O, K = named
    pattern = Pattern(n, m)
    if m not in WINDOWS or min(O, K, lanes) < 1:
        raise ValueError(f"{list(numbers)} makes no layout for GEMV: make it with openwork.layouts.gemv")
    window = WINDOWS[m]
    windows, slots, blocks = -(-K // window), window // m * pattern.n, -(-O // lanes)
    indices = blocks * gemv.words_of(windows, slots, window) * lanes
    stored = windows * slots + (windows * slots % 2 if paired else 0)
    return GemvSizes(named, window, slots, windows, blocks, blocks * stored * lanes, indices)


def check_gemv(
    isa: Isa, values: Tensor, indices: Tensor, scales: Tensor | None, bias: Tensor | None, numbers: Sequence[int]
) -> GemvSizes:
    stored = values.dtype == torch.int8 if scales is not None else values.dtype in (torch.float32, torch.bfloat16)
    sizes = gemv_sizes(tuple(numbers), values.dtype == torch.bfloat16)
    _check_vectors(sizes.numbers.lanes, isa.lanes)
    _check(stored and _whole(values, sizes.values), "values", values, numbers)
    _check(indices.dtype == torch.int32 and _whole(indices, sizes.indices), "indices", indices, numbers)
    _check_outputs(scales, bias, sizes.numbers.outputs, numbers)
    return sizes


@dataclass(frozen=True)
class DotProductSizes:
    numbers: DotProductNumbers
    window: int
    steps: int
    windows: int
    blocks: int
    values: int
    indices: int


@functools.lru_cache(maxsize=4096)
def dot_product_sizes(numbers: tuple[int, ...], dtype: torch.dtype) -> DotProductSizes:
    """What a dot product layout consists of."""
    named = numbers_of(DotProduct, numbers)
    n, m, lanes, O, K = named
    if min(O, K, lanes) < 1:
        raise ValueError(f"{list(numbers)} makes no layout of dot products: make it with openwork.layouts.dot_product")
    one = dot_product.sizes_of(dtype, Pattern(n, m), lanes)
    windows, blocks = -(-K // one.window), -(-O // lanes)
    step = blocks * windows * lanes * one.together
    indices = one.steps + one.steps % 2 if dtype == torch.bfloat16 else one.steps
    return DotProductSizes(named, one.window, one.steps, windows, blocks, step * one.steps, step * indices)


def check_dot_product(
    isa: Isa, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int]
) -> DotProductSizes:
    values, indices, scales = split(packed)
    sizes = dot_product_sizes(tuple(numbers), values.dtype)
    _check_vectors(sizes.numbers.lanes, isa.lanes)
    stored = (values.dtype == torch.int8) == (scales is not None)
    _check(stored and _whole(values, sizes.values), "values", values, numbers)
    _check(indices.dtype == torch.uint8 and _whole(indices, sizes.indices), "indices", indices, numbers)
    _check_outputs(scales, bias, sizes.numbers.outputs, numbers)
    return sizes


def rows_of(x: Tensor, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., K) -> (B, K), each row in one stretch of memory."""
    if x.ndim == 0 or x.shape[-1] != K or x.dtype != dtype:
        needed = str(dtype).removeprefix("torch.")
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype}; needed {needed} (..., {K})")
    flat = x if x.ndim == 2 else x.reshape(-1, K)
    return flat if flat.is_contiguous() or (flat.stride(1) == 1 and flat.stride(0) >= K) else flat.contiguous()


def rows_at(rows: Tensor) -> int | None:
    """The address of what `rows_of` gave."""
    return address(rows, (rows.shape[0] - 1) * rows.stride(0) + rows.shape[1] if len(rows) else 0)


@functools.lru_cache(maxsize=4096)
def geometry_of(numbers: tuple[int, ...]) -> ConvGeometry:
    return ConvGeometry.of(numbers)


def output_size(x: Tensor, geometry: ConvGeometry) -> tuple[int, int]:
    size = geometry.output_size(x.shape[2], x.shape[3])
    if min(size) < 1:
        kernel, padding = list(geometry.kernel), list(geometry.padding)
        raise ValueError(f"input {tuple(x.shape)} is smaller than the kernel {kernel} with padding {padding}")
    return size


def check_channels(x: Tensor, geometry: ConvGeometry, numbers: Any) -> int:
    """The channels of one group of an image batch that fits the weight."""
    groups, (kernel_h, kernel_w), K = geometry.groups, geometry.kernel, numbers.inputs
    channels = x.shape[1] // groups if x.ndim == 4 else 0
    padded = -(-channels // numbers.m) * numbers.m
    fits = channels and padded * kernel_h * kernel_w == K and channels * groups == x.shape[1]
    if not fits or numbers.outputs % groups:
        raise ValueError(
            f"input {tuple(x.shape)} for a kernel {[kernel_h, kernel_w]}, {counted(groups, 'group')} "
            f"and {counted(K, 'input')} of each output"
        )
    return channels


def _check_vectors(packed: int, here: int) -> None:
    if packed != here:
        raise RuntimeError(
            f"the weight is packed for vectors of another size ({packed}, here {here}): it comes from a machine or an "
            "OPENWORK_ISA with another instruction set; deploy again, or load the finalized model and deploy it here"
        )


def _check_outputs(scales: Tensor | None, bias: Tensor | None, O: int, numbers: Sequence[int]) -> None:
    """What there is one of for each output."""
    for name, tensor in (("bias", bias), ("scales", scales)):
        if tensor is not None:
            _check(tensor.dtype == torch.float32 and _whole(tensor, O), name, tensor, numbers)


def _whole(tensor: Tensor, count: int) -> bool:
    """Whether a tensor is so many numbers side by side in memory."""
    return tensor.numel() == count and tensor.is_contiguous()


def _check(holds: bool, what: str, tensor: Tensor, numbers: Sequence[int]) -> None:
    if not holds:
        shape = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise ValueError(f"{what} {shape} do not fit the layout {list(numbers)}: make them with openwork.layouts")
