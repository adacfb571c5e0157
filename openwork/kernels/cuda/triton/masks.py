"""The mask operators in Triton: one pass over the weight where it lies, a list in one launch.

    P = groups that one program takes, M = group size, MP = M rounded up to a power of two, T = tensors in a list

The largest of a group's keys is found and taken out, N times; or the smallest, M - N times, where that is less work.
Keys are the integer bits of magnitudes, as in `openwork.nm.masks.sortable`; they stay in registers. Where groups are
contiguous, neighbouring lanes hold neighbours of a group; where they are not, neighbouring groups, since those are
neighbours in memory.

Weights travel as integers of their width, so that every bit survives. No operation of the SR-STE term is fused with
another (`enable_fp_fusion=False`): its rounding is that of the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openwork.kernels.cpu.groups import groups_in_memory, same_strides
from openwork.kernels.cuda.stream import capturing, on_device
from openwork.kernels.cuda.triton.floats import INTEGERS, KINDS, WORDS, rounded, to_float32
from openwork.kernels.cuda.triton.launch import row_of, table
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.library import parsed
from openwork.ops.masks import add_decay, check_decay

KEEP, PRUNE, DECAY = 0, 1, 2
"""What is written: the mask as bytes, the pruned weight, or the gradient with the term added."""

WHOLE, SHORT, STRIDED = 0, 1, 2
"""How groups lie: one after the other, none short; one after the other; with weights of other groups in between."""

_WEIGHTS = 1024  # that one program takes
_LANES = 128  # that one program has
_MOST = 32  # keys that one lane holds
_UNROLLED = 128  # rounds times MP; more are a loop, whose code does not grow with them
_INFINITY = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_TAKEN = tl.constexpr(-(2**31))  # below every key


@triton.jit
def _key(bits, INFINITY: tl.constexpr):
    """Integers in the order of magnitudes, all NaN alike above infinity."""
    most: tl.constexpr = 0x7FFFFFFF if bits.dtype.primitive_bitwidth == 32 else 0x7FFF
    return tl.minimum(bits.to(tl.int32) & most, INFINITY + 1)


@triton.jit
def _without_largest(keys, place, MP: tl.constexpr, AXIS: tl.constexpr, UNIQUE: tl.constexpr):
    """The largest key of each group becomes `_TAKEN`: of equal ones that of the lowest place."""
    largest = keys == tl.expand_dims(tl.max(keys, AXIS), AXIS)
    if not UNIQUE:
        largest = place == tl.expand_dims(tl.min(tl.where(largest, place, MP), AXIS), AXIS)
    return tl.where(largest, _TAKEN, keys)


@triton.jit
def _kept(
    bits, position,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, AXIS: tl.constexpr, UNROLLED: tl.constexpr,
    INFINITY: tl.constexpr,
):  # fmt: skip
    """Which weights are kept. Where dropping is less work, keys and places are reversed. `bits` beyond a short group
    are 0, at the last positions: kept after all of the group, dropped before. Keys of 16 bits have room for the place:
    then no two are equal."""
    DROPS: tl.constexpr = 2 * N > M
    ROUNDS: tl.constexpr = M - N if DROPS else N
    UNIQUE: tl.constexpr = bits.dtype.primitive_bitwidth == 16
    keys = _key(bits, INFINITY)
    place = position
    if DROPS:
        keys = -1 - keys
        place = MP - 1 - position
    if UNIQUE:
        keys = keys * MP + (MP - 1 - place)
    if DROPS and M < MP:
        keys = tl.where(position < M, keys, _TAKEN)
    if ROUNDS * MP <= UNROLLED:
        for _ in tl.static_range(ROUNDS):
            keys = _without_largest(keys, place, MP, AXIS, UNIQUE)
    else:
        for _ in range(ROUNDS):
            keys = _without_largest(keys, place, MP, AXIS, UNIQUE)
    return keys != _TAKEN if DROPS else keys == _TAKEN


@triton.jit
def _group(
    weight, out, first, lanes, length, inner, rate,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, HOW: tl.constexpr, UNROLLED: tl.constexpr,
    TASK: tl.constexpr, INFINITY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """P groups from group `first` on."""
    AXIS: tl.constexpr = 0 if HOW == 2 else 1
    lane = first + tl.arange(0, P)
    position = tl.expand_dims(tl.arange(0, MP), 1 - AXIS)
    known = lane < lanes
    if HOW == 0:
        start = lane.to(tl.int64) * M
        size = tl.full([P], M, tl.int32)
        at = position
    else:
        if HOW == 1:
            inner = 1
        groups = (length + M - 1) // M
        row = lane // inner
        group = row % groups
        start = ((row // groups).to(tl.int64) * length + group * M) * inner + lane % inner
        size = tl.minimum(length - group * M, M)
        at = position * inner
    inside = tl.expand_dims(known, AXIS) & (position >= 0)
    if HOW != 0 or M != MP:
        inside &= position < tl.expand_dims(size, AXIS)
    weight = tl.expand_dims(weight + start, AXIS) + at
    out = tl.expand_dims(out + start, AXIS) + at
    bits = tl.load(weight, mask=inside, other=0)
    keep = _kept(bits, position, N, M, MP, AXIS, UNROLLED, INFINITY)
    if TASK == 0:
        tl.store(out, keep.to(tl.uint8), mask=inside)
    elif TASK == 1:
        tl.store(out, tl.where(keep, bits, tl.zeros_like(bits)), mask=inside)
    else:
        pruned = to_float32(tl.where(keep, tl.zeros_like(bits), bits), KIND)
        gradient = to_float32(tl.load(out, mask=inside, other=0), KIND)
        term = to_float32(rounded(pruned * rate, KIND), KIND)
        tl.store(out, rounded(gradient + term, KIND), mask=inside)


@triton.jit(do_not_specialize=["lanes", "length", "inner"])
def _one(
    weight, out, lanes, length, inner, rate,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, HOW: tl.constexpr, UNROLLED: tl.constexpr,
    TASK: tl.constexpr, INFINITY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    _group(
        weight, out, tl.program_id(0) * P, lanes, length, inner, rate,
        N, M, MP, P, HOW, UNROLLED, TASK, INFINITY, KIND,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors"])
def _many(
    rows, tensors, rate,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, HOW: tl.constexpr, UNROLLED: tl.constexpr,
    TASK: tl.constexpr, INFINITY: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """`rows` (T, 6) int64: first program, weight, out (addresses, of 16 bytes each a multiple), groups, length,
    inner."""
    program = tl.program_id(0)
    row = rows + row_of(rows, tensors, program, 6) * 6
    weight = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(BITS)), 16)
    out = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(OUT)), 16)
    lanes = tl.load(row + 3).to(tl.int32)
    length = tl.load(row + 4).to(tl.int32)
    inner = tl.load(row + 5).to(tl.int32)
    first = (program - tl.load(row).to(tl.int32)) * P
    _group(weight, out, first, lanes, length, inner, rate, N, M, MP, P, HOW, UNROLLED, TASK, INFINITY, KIND)


class GroupLayout(NamedTuple):
    """Where the groups of a weight lie, in the numbers that the kernels take."""

    n: int
    m: int
    how: int  # WHOLE, SHORT or STRIDED
    lanes: int  # groups
    length: int
    inner: int


# --- the operators -------------------------------------------------------------------------------------------------


def foreach_mask(scores: Sequence[Tensor], n: int, m: int, axes: Sequence[int]) -> list[Tensor]:
    pattern, places = parsed(scores, n, m, axes)
    masks = [torch.empty_like(score, dtype=torch.bool) for score in scores]
    for i in _launch(scores, [mask.view(torch.uint8) for mask in masks], pattern, places, KEEP):
        masks[i] = magnitude_mask(scores[i], pattern, places[i])
    return masks


def foreach_prune(weights: Sequence[Tensor], n: int, m: int, axes: Sequence[int]) -> list[Tensor]:
    pattern, places = parsed(weights, n, m, axes)
    pruned = [torch.empty_like(weight) for weight in weights]
    for i in _launch(weights, pruned, pattern, places, PRUNE):
        pruned[i] = apply_mask(weights[i], magnitude_mask(weights[i].abs(), pattern, places[i]))
    return pruned


def foreach_decay(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], rate: float, n: int, m: int, axes: Sequence[int]
) -> None:
    check_decay(gradients, weights, rate)
    pattern, places = parsed(weights, n, m, axes)
    for i in _launch(weights, gradients, pattern, places, DECAY, rate):
        add_decay(gradients[i], weights[i], rate, magnitude_mask(weights[i].abs(), pattern, places[i]))


# --- launches ------------------------------------------------------------------------------------------------------


def group_layout(weight: Tensor, pattern: Pattern, axis: Axis) -> GroupLayout | None:
    """Where the groups of a weight lie; None where the reference must run."""
    return layout_at(weight.shape, weight.stride(), pattern, axis) if weight.dtype in INTEGERS else None


@functools.lru_cache(maxsize=4096)
def layout_at(shape: tuple[int, ...], stride: tuple[int, ...], pattern: Pattern, axis: Axis) -> GroupLayout | None:
    """Remembered: it takes longer than a launch, and a model asks the same in every step."""
    weight = torch.empty_strided(shape, stride, device="meta")
    groups = groups_in_memory(weight, pattern.n, pattern.m, axis)
    if groups is None:
        return None
    n, m, length, inner = pattern.n, pattern.m, groups.length, groups.inner
    lanes = groups.outer * -(-length // m) * inner
    # The kernels count lanes, and steps within a group, in 32 bits.
    most = max(lanes + _WEIGHTS, length + m, inner, (min(m, length) - 1) * inner)
    if not lanes or most >= 2**31:
        return None
    return GroupLayout(n, m, STRIDED if inner > 1 else SHORT if length % m else WHOLE, lanes, length, inner)


def _launch(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    pattern: Pattern,
    axes: Sequence[Axis],
    task: int,
    rate: float = 0.0,
) -> list[int]:
    """One launch for all weights of a dtype, device and kind of layout; one for each where there is but one weight or a
    CUDA graph is captured. Returns which weights are left to the reference."""
    alone = len(weights) == 1 or capturing(*weights)
    kinds: dict[Any, list[tuple[int, ...]]] = {}
    left = []
    for i, (weight, out, axis) in enumerate(zip(weights, outs, axes, strict=True)):
        layout = group_layout(weight, pattern, axis)
        addresses = weight.data_ptr(), out.data_ptr()
        if layout is None or not (same_strides(out, weight) if task == KEEP else _alike(out, weight)):
            left.append(i)
        elif alone or any(address % 16 for address in addresses):
            _launch_one(weight, out, layout, task, rate)
        else:
            kinds.setdefault((weight.device, weight.dtype, layout.how), []).append((*addresses, *layout[3:]))
    for (device, dtype, how), rows in kinds.items():
        _load_one(device, dtype, pattern.n, pattern.m, how, task)
        _launch_many(rows, device, dtype, pattern.n, pattern.m, how, task, rate)
    return left


def _alike(out: Tensor, weight: Tensor) -> bool:
    return same_strides(out, weight) and out.dtype == weight.dtype and out.device == weight.device


def _sizes(m: int, how: int) -> tuple[int, int]:
    """MP and P: `_WEIGHTS`, but of strided groups as many as the program has lanes, so that each has all keys of a
    group in its registers, where they fit."""
    padded = triton.next_power_of_2(m)
    return padded, max(_WEIGHTS // padded, min(_LANES, _LANES * _MOST // padded) if how == STRIDED else 1)


def _launch_one(weight: Tensor, out: Tensor, layout: GroupLayout, task: int, rate: float = 0.0) -> None:
    MP, P = _sizes(layout.m, layout.how)
    with on_device(weight.device):
        _one[(max(1, -(-layout.lanes // P)),)](
            weight.view(INTEGERS[weight.dtype]), out if task == KEEP else out.view(INTEGERS[out.dtype]),
            layout.lanes, layout.length, layout.inner, rate,
            layout.n, layout.m, MP, P, layout.how, _UNROLLED, task, _INFINITY[weight.dtype], KINDS[weight.dtype],
            num_warps=_LANES // 32, enable_fp_fusion=False,
        )  # fmt: skip


def _launch_many(
    rows: list[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    m: int,
    how: int,
    task: int,
    rate: float,
) -> None:
    MP, P = _sizes(m, how)
    counts = [-(-lanes // P) for _, _, lanes, _, _ in rows]  # `triton.cdiv` takes microseconds
    word = WORDS[dtype]
    placed = table(rows, counts, device)
    with on_device(device):
        _many[(sum(counts),)](
            placed, len(rows), rate, n, m, MP, P, how, _UNROLLED,
            task, _INFINITY[dtype], KINDS[dtype], word, tl.uint8 if task == KEEP else word,
            num_warps=_LANES // 32, enable_fp_fusion=False,
        )  # fmt: skip


@functools.cache
def _load_one(device: torch.device, dtype: torch.dtype, n: int, m: int, how: int, task: int) -> None:
    """Launch `_one` on no groups: so that it is on the GPU when a CUDA graph, into which nothing can be loaded, needs
    it in place of `_many`."""
    nothing = torch.empty(16, dtype=dtype, device=device)
    out = torch.empty(16, dtype=torch.uint8 if task == KEEP else dtype, device=device)
    _launch_one(nothing, out, GroupLayout(n, m, how, 0, m, 1), task)
