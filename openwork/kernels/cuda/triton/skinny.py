"""Products of up to 16 rows with an N:M weight in Triton: `openwork.layouts.skinny` has the layout.

    BO = outputs of a program, BG = groups that it takes at once, BP = rows of input rounded up, MP = M rounded up

`_gather` reads, for each kept weight, the inputs that its index names: work for kept weights alone, best for few rows
and sparse patterns. `_expand` makes a dense tile of the weight in registers and multiplies on tensor cores: its work
does not grow with the rows. The reduction is cut into parts, so that there are programs enough to keep memory busy;
`_finish` adds them, always in one order. Nothing is compiled anew for another number of rows, but `_gather` for its
powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from openwork.kernels.cpu.native import address
from openwork.kernels.cuda.stream import on_device
from openwork.kernels.cuda.triton.floats import INTEGERS, KINDS, rounded, to_float32
from openwork.layouts.layout import KernelRefused, numbers_of
from openwork.layouts.skinny import ROWS, SkinnyExpand, SkinnyGather, check_skinny, skinny_index_bits
from openwork.nm.pattern import Pattern
from openwork.ops.sparse_matmul import linear as reference

_EXPANDED = 64  # of the largest M whose groups become a dense tile
_UNROLLED = tl.constexpr(8)  # slots; more are a loop, whose code does not grow with them


@triton.jit
def _slots(values, indices, g, column, inside, slot, groups, OP, N: tl.constexpr, BITS: tl.constexpr):
    """Values (as integers) and indices of one slot of groups g: both [BG, BO]."""
    value = tl.load(values + (slot * groups + g)[:, None].to(tl.int64) * OP + column[None, :], mask=inside, other=0)
    at = g * N + slot
    per: tl.constexpr = 32 // BITS
    word = tl.load(indices + (at // per)[:, None].to(tl.int64) * OP + column[None, :], mask=inside, other=0)
    return value, (word >> (at % per * BITS)[:, None]) & ((1 << BITS) - 1)


@triton.jit
def _added(
    total, x, values, indices, g, column, inside, row, slot, B, K, OP, groups,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`total` [BP, BG, BO] and what one slot of groups g adds."""
    value, index = _slots(values, indices, g, column, inside, slot, groups, OP, N, BITS)
    k = g[:, None] * M + index
    there = (row < B)[:, None, None] & (inside & (k < K))[None, :, :]
    taken = tl.load(x + row[:, None, None] * K + k[None, :, :], mask=there, other=0)
    return total + to_float32(value, KIND)[None, :, :] * to_float32(taken, KIND)


@triton.jit
def _placed(
    tile, values, indices, g, column, inside, position, slot, OP, groups, N: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """`tile` [BG, MP, BO] with one slot of groups g in its place. Spare slots hold zero at an index that no other slot
    has, so "or" puts each where it belongs."""
    value, index = _slots(values, indices, g, column, inside, slot, groups, OP, N, BITS)
    here = index[:, None, :] == position[None, :, None]
    return tile | tl.where(here, value[:, None, :], tl.zeros_like(value)[:, None, :])


@triton.jit(do_not_specialize=["B", "groups", "share"])
def _gather(
    x, values, indices, parts, B, K, OP, groups, share,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """`parts` (parts, B, OP) float32. `share`: groups of one part."""
    column = tl.program_id(0) * BO + tl.arange(0, BO)
    part = tl.program_id(1)
    row = tl.arange(0, BP)
    last = tl.minimum((part + 1) * share, groups)
    total = tl.zeros([BP, BG, BO], tl.float32)
    for first in range(part * share, last, BG):
        g = first + tl.arange(0, BG)
        inside = (g < last)[:, None] & (column < OP)[None, :]
        if N <= _UNROLLED:
            for slot in tl.static_range(N):
                total = _added(
                    total, x, values, indices, g, column, inside, row, slot, B, K, OP, groups, N, M, BITS, KIND
                )
        else:
            for slot in range(N):
                total = _added(
                    total, x, values, indices, g, column, inside, row, slot, B, K, OP, groups, N, M, BITS, KIND
                )
    known = (row < B)[:, None] & (column < OP)[None, :]
    tl.store(parts + (part * B + row)[:, None] * OP + column[None, :], tl.sum(total, axis=1), mask=known)


@triton.jit(do_not_specialize=["B", "groups", "share"])
def _expand(
    x, values, indices, parts, B, K, OP, groups, share,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    MP: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """As `_gather`, for 16 rows: rows from B on are zeros."""
    column = tl.program_id(0) * BO + tl.arange(0, BO)
    part = tl.program_id(1)
    row = tl.arange(0, 16)
    position = tl.arange(0, MP)
    last = tl.minimum((part + 1) * share, groups)
    total = tl.zeros([16, BO], tl.float32)
    for first in range(part * share, last, BG):
        g = first + tl.arange(0, BG)
        inside = (g < last)[:, None] & (column < OP)[None, :]
        tile = tl.zeros([BG, MP, BO], values.dtype.element_ty)
        if N <= _UNROLLED:
            for slot in tl.static_range(N):
                tile = _placed(tile, values, indices, g, column, inside, position, slot, OP, groups, N, BITS)
        else:
            for slot in range(N):
                tile = _placed(tile, values, indices, g, column, inside, position, slot, OP, groups, N, BITS)
        k = tl.reshape(g[:, None] * M + position[None, :], [BG * MP])
        used = tl.reshape(((g < last)[:, None]) & (position < M)[None, :], [BG * MP]) & (k < K)
        there = (row < B)[:, None] & used[None, :]
        taken = tl.load(x + row[:, None] * K + k[None, :], mask=there, other=0).to(KIND, bitcast=True)
        weight = tl.reshape(tile, [BG * MP, BO]).to(KIND, bitcast=True)
        total = tl.dot(taken, weight, total)
    known = (row < B)[:, None] & (column < OP)[None, :]
    tl.store(parts + (part * B + row)[:, None] * OP + column[None, :], total, mask=known)


@triton.jit(do_not_specialize=["B", "count"])
def _finish(
    parts, bias, y, B, O, OP, count,
    BIAS: tl.constexpr, RELU: tl.constexpr, KIND: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One row of the result: the parts added in order, the bias, ReLU, the cast."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BO + tl.arange(0, BO)
    known = column < O
    total = tl.zeros([BO], tl.float32)
    for part in range(count):
        total += tl.load(parts + (part * B + row) * OP + column, mask=known, other=0.0)
    if BIAS:
        total += to_float32(tl.load(bias + column, mask=known, other=0), KIND)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)
    tl.store(y + row * O + column, rounded(total, KIND), mask=known)


def skinny_gather_linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool
) -> Tensor:
    return _linear(x, packed, bias, numbers, relu, expand=False)


def skinny_expand_linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool
) -> Tensor:
    return _linear(x, packed, bias, numbers, relu, expand=True)


def _linear(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, numbers: Sequence[int], relu: bool, *, expand: bool
) -> Tensor:
    layout = SkinnyExpand if expand else SkinnyGather
    named = numbers_of(layout, numbers)
    check_skinny(x, packed, bias, named)
    for each in (x, *packed, bias):
        address(each)
    (values, indices), (n, m, O, K) = packed, named
    B, kind = len(x), KINDS[values.dtype]
    if not 0 < B <= ROWS:
        return reference(layout, x, packed, bias, numbers, relu)
    word, bits, groups, OP = INTEGERS[values.dtype], skinny_index_bits(Pattern(n, m)), values.shape[1], values.shape[2]
    BO, BG = tile(n, m, B, expand)
    columns = triton.cdiv(OP, BO)
    count = parts_of(groups, BG, columns, processors(x.device))
    share = triton.cdiv(groups, count)
    parts = torch.empty(count, B, OP, dtype=torch.float32, device=x.device)
    y = torch.empty(B, O, dtype=x.dtype, device=x.device)
    sizes: Any = (B, K, OP, groups, share, n, m, bits, kind)
    tensors = (x.contiguous().view(word), values.view(word), indices, parts)
    added = parts if bias is None else bias.view(word)  # any address where there is none
    finish = (parts, added, y.view(word), B, O, OP, count, bias is not None, relu, kind, 256)
    try:
        with on_device(x.device):
            if expand:
                _expand[(columns, count)](*tensors, *sizes, triton.next_power_of_2(m), BG, BO, num_warps=4)
            else:
                _gather[(columns, count)](*tensors, *sizes, triton.next_power_of_2(B), BG, BO, num_warps=4)
            _finish[(triton.cdiv(O, 256), B)](*finish)
    except (CompilationError, OutOfResources, PTXASError) as error:
        raise KernelRefused(f"Triton: {error}") from error
    return y


def tile(n: int, m: int, rows: int, expand: bool) -> tuple[int, int]:
    """BO and BG: so many numbers at once as 128 threads hold in registers."""
    if expand:
        return 64, max(1, _EXPANDED // triton.next_power_of_2(m))
    return 32, max(2, 32 // triton.next_power_of_2(rows))


def parts_of(groups: int, at_once: int, columns: int, processors: int) -> int:
    """Into how many parts the reduction is cut: four programs for each multiprocessor, four tiles in each program."""
    return max(1, min(-(-4 * processors // columns), groups // (4 * at_once), 64))


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
