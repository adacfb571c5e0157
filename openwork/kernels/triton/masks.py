"""The mask operators in Triton: one pass over the weight where it lies, for one weight or for a list in one launch.

    P = groups that one program takes, M = group size, MP = M rounded up to a power of two, T = tensors in a list

A weight is kept when fewer than N others of its group beat it. Each lane compares its own key with the M keys of its
group, one after the other; they are read again from the first-level cache, so nothing is exchanged between lanes and
any M works. Keys are the integer bits of magnitudes, as in `openwork.masks.sortable`.

Weights travel as integers of their width, so that every bit survives. No operation of the SR-STE term is fused with
another (`enable_fp_fusion=False`): its rounding is that of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from openwork.kernels.groups import groups_in_memory
from openwork.kernels.native import Groups
from openwork.kernels.triton.floats import INTEGERS, KINDS, WORDS, rounded, to_float32
from openwork.kernels.triton.launch import on_device, programs, table
from openwork.ops import masks as reference
from openwork.ops.masks import Where, demand_alike, parsed

KEEP, PRUNE, DECAY = 0, 1, 2
"""What is written: the mask as bytes, the pruned weight, or the gradient with the term added."""

_WEIGHTS = 1024  # that one program takes
_INFINITY = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def _key(bits, INFINITY: tl.constexpr):
    """Integers in the order of magnitudes, all NaN alike above infinity."""
    most: tl.constexpr = 0x7FFFFFFF if bits.dtype.primitive_bitwidth == 32 else 0x7FFF
    return tl.minimum(bits.to(tl.int32) & most, INFINITY + 1)


@triton.jit
def _beats(at, there, key, position, j, INFINITY: tl.constexpr):
    """1 where weight `j` of the group is ranked before the lane's own. Keys are integers: adding one where `j` comes
    first makes "more" of "at least"."""
    other = tl.where(there, _key(tl.load(at, mask=there, other=0), INFINITY), -2)
    return (other[:, None] + (position > j).to(tl.int32)[None, :] > key).to(tl.int32)


@triton.jit
def _group(
    weight, out, first, lanes, length, inner, rate,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, P: tl.constexpr,
    WHOLE: tl.constexpr, TASK: tl.constexpr, INFINITY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """P groups from group `first` on. WHOLE: the groups lie one after the other, none of them short."""
    lane = first + tl.arange(0, P)
    position = tl.arange(0, MP)
    if WHOLE:
        start = lane.to(tl.int64) * M
        size = tl.full([P], M, tl.int32)
        step = 1
    else:
        groups = (length + M - 1) // M
        row = lane // inner
        group = row % groups
        start = ((row // groups).to(tl.int64) * length + group * M) * inner + lane % inner
        size = tl.minimum(length - group * M, M)
        step = inner
    known = lane < lanes
    at = start[:, None] + position[None, :] * step
    if WHOLE and M == MP:
        inside = known[:, None] & (position >= 0)[None, :]
    else:
        inside = known[:, None] & (position[None, :] < size[:, None])
    bits = tl.load(weight + at, mask=inside, other=0)
    key = _key(bits, INFINITY)
    lost = tl.zeros([P, MP], tl.int32)
    if M <= 16:
        for j in tl.static_range(M):
            lost += _beats(weight + start + j * step, known & (j < size), key, position, j, INFINITY)
    else:
        for j in range(M):
            lost += _beats(weight + start + j * step, known & (j < size), key, position, j, INFINITY)
    keep = lost < N
    if TASK == 0:
        tl.store(out + at, keep.to(tl.uint8), mask=inside)
    elif TASK == 1:
        tl.store(out + at, tl.where(keep, bits, tl.zeros_like(bits)), mask=inside)
    else:
        pruned = to_float32(tl.where(keep, tl.zeros_like(bits), bits), KIND)
        gradient = to_float32(tl.load(out + at, mask=inside, other=0), KIND)
        term = to_float32(rounded(pruned * rate, KIND), KIND)
        tl.store(out + at, rounded(gradient + term, KIND), mask=inside)


@triton.jit
def _one(
    weight, out, lanes, length, inner, rate,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, P: tl.constexpr,
    WHOLE: tl.constexpr, TASK: tl.constexpr, INFINITY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    _group(
        weight, out, tl.program_id(0) * P, lanes, length, inner, rate,
        N, M, MP, P, WHOLE, TASK, INFINITY, KIND,
    )  # fmt: skip


@triton.jit
def _many(
    rows, owner, rate,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, P: tl.constexpr,
    TASK: tl.constexpr, INFINITY: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """`rows` (T, 6) int64: weight, out (addresses, of 16 bytes each a multiple), groups, length, inner, first program.
    `owner` (programs,) int32: which tensor."""
    program = tl.program_id(0)
    row = rows + tl.load(owner + program) * 6
    weight = tl.multiple_of(tl.load(row).to(tl.pointer_type(BITS)), 16)
    out = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(OUT)), 16)
    lanes = tl.load(row + 2).to(tl.int32)
    length = tl.load(row + 3).to(tl.int32)
    inner = tl.load(row + 4).to(tl.int32)
    first = (program - tl.load(row + 5).to(tl.int32)) * P
    if (inner == 1) & (length % M == 0):
        _group(weight, out, first, lanes, length, inner, rate, N, M, MP, P, True, TASK, INFINITY, KIND)
    else:
        _group(weight, out, first, lanes, length, inner, rate, N, M, MP, P, False, TASK, INFINITY, KIND)


# --- one weight ----------------------------------------------------------------------------------------------------


def keep_largest(score: Tensor, *where: Any) -> Tensor:
    groups = _groups(score, where)
    if groups is None:
        return reference._keep_largest(score, *where)
    mask = torch.empty_like(score, dtype=torch.bool)
    _launch(score, mask.view(torch.uint8), groups, KEEP)
    return mask


def prune(weight: Tensor, *where: Any) -> Tensor:
    groups = _groups(weight, where)
    if groups is None:
        return reference._prune(weight, *where)
    pruned = torch.empty_like(weight)
    _launch(weight, pruned.view(INTEGERS[weight.dtype]), groups, PRUNE)
    return pruned


def add_decayed(gradient: Tensor, weight: Tensor, rate: float, *where: Any) -> None:
    demand_alike(gradient, weight)
    groups = _groups(weight, where)
    if groups is None or not _alike(gradient, weight):
        return reference._add_decayed(gradient, weight, rate, *where)
    return _launch(weight, gradient.view(INTEGERS[weight.dtype]), groups, DECAY, rate)


def _groups(weight: Tensor, where: tuple[Any, ...]) -> Groups | None:
    """How the groups lie; None where the reference must run."""
    pattern, axis = parsed(weight, *where)
    if weight.dtype not in INTEGERS or not 0 < weight.numel() < 2**31 * pattern.m:
        return None
    found = groups_in_memory(weight, pattern.n, pattern.m, axis)
    return (
        None if found is None or _lanes(found) >= 2**31 - _WEIGHTS or max(found.length, found.inner) >= 2**31 else found
    )


def _alike(gradient: Tensor, weight: Tensor) -> bool:
    return gradient.stride() == weight.stride() and gradient.dtype == weight.dtype and gradient.device == weight.device


def _lanes(groups: Groups) -> int:
    return groups.outer * -(-groups.length // groups.m) * groups.inner


def _launch(weight: Tensor, out: Tensor, groups: Groups, task: int, rate: float = 0.0) -> None:
    padded = triton.next_power_of_2(groups.m)
    P = max(1, _WEIGHTS // padded)
    whole = groups.inner == 1 and groups.length % groups.m == 0
    with on_device(weight):
        _one[(triton.cdiv(_lanes(groups), P),)](
            weight.view(INTEGERS[weight.dtype]), out, _lanes(groups), groups.length, groups.inner, rate,
            groups.n, groups.m, padded, P, whole, task, _INFINITY[weight.dtype], KINDS[weight.dtype],
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


# --- lists ---------------------------------------------------------------------------------------------------------


def keep_largest_list(scores: Sequence[Tensor], n: int, m: int, *each: Sequence[Any]) -> list[Tensor]:
    where: list[Where] = list(zip(*each, strict=True))
    masks = [torch.empty_like(score, dtype=torch.bool) for score in scores]
    outs = [mask.view(torch.uint8) for mask in masks]
    for index in _launch_list(scores, outs, n, m, where, KEEP):
        masks[index].copy_(reference._keep_largest(scores[index], n, m, *where[index]))
    return masks


def prune_list(weights: Sequence[Tensor], n: int, m: int, *each: Sequence[Any]) -> list[Tensor]:
    where: list[Where] = list(zip(*each, strict=True))
    pruned = [torch.empty_like(weight) for weight in weights]
    for index in _launch_list(weights, pruned, n, m, where, PRUNE):
        pruned[index] = prune(weights[index], n, m, *where[index])
    return pruned


def add_decayed_list(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], rate: float, n: int, m: int, *each: Sequence[Any]
) -> None:
    where: list[Where] = list(zip(*each, strict=True))
    for gradient, weight in zip(gradients, weights, strict=True):
        demand_alike(gradient, weight)
    for index in _launch_list(weights, gradients, n, m, where, DECAY, rate):
        add_decayed(gradients[index], weights[index], rate, n, m, *where[index])


def _launch_list(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    n: int,
    m: int,
    where: Sequence[Where],
    task: int,
    rate: float = 0.0,
) -> list[int]:
    """One launch for each dtype and device. Returns which tensors it left out: those that it cannot take."""
    kinds: dict[Any, list[int]] = {}
    found = [_groups(weight, (n, m, *each)) for weight, each in zip(weights, where, strict=True)]
    for index, (weight, out, groups) in enumerate(zip(weights, outs, found, strict=True)):
        fits = groups is not None and out.stride() == weight.stride() and out.device == weight.device
        fits = fits and (task == KEEP or out.dtype == weight.dtype)
        if fits and weight.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0:
            kinds.setdefault((weight.dtype, weight.device), []).append(index)
    for (dtype, device), indices in kinds.items():
        padded = triton.next_power_of_2(m)
        P = max(1, _WEIGHTS // padded)
        chosen = [(weights[i], outs[i], found[i]) for i in indices]
        rows = tuple((w.data_ptr(), o.data_ptr(), _lanes(g), g.length, g.inner) for w, o, g in chosen)  # type: ignore[arg-type, union-attr]
        counts = tuple(triton.cdiv(row[2], P) for row in rows)
        word = WORDS[dtype]
        with on_device(weights[indices[0]]):
            _many[(sum(counts),)](
                table(rows, counts, device), programs(counts, device), rate, n, m, padded, P,
                task, _INFINITY[dtype], KINDS[dtype], word, tl.uint8 if task == KEEP else word,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    taken = {index for indices in kinds.values() for index in indices}
    return [index for index in range(len(weights)) if index not in taken]
