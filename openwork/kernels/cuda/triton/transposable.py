"""The exact transposable 2:4 mask of 4x4 tiles in Triton: one pass over the weight where it lies.

    B = tiles that one program takes, one in each lane

Each lane does what `openwork.nm.transposable.best_2_4` does, the same additions and comparisons in the same order, so
that masks are equal bit for bit, ties included: 6 pairs of columns a row, 36 combinations of two rows, and for each of
the upper 36 the best lower one of the class that complements it. Sums are of float32, without products, so nothing
can be fused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from openwork.kernels.cuda.stream import on_device
from openwork.nm.groups import Axis
from openwork.nm.transposable import PAIRS, classes_of_pairs, columns_of, transposable_mask
from openwork.ops.library import parsed, parsed_axes

KINDS = (torch.float32, torch.bfloat16, torch.float16)
_TILES = 128

# Of each lower combination 6 p + q: its class. Of each upper one: the class that it meets.
_PLACE = {columns: index for index, (columns, _) in enumerate(classes_of_pairs())}
_ALL = [columns_of(p, q) for p in range(6) for q in range(6)]
_CLASS = tl.constexpr(tuple(_PLACE[columns] for columns in _ALL))
_MEETS = tl.constexpr(tuple(_PLACE[tuple(2 - count for count in columns)] for columns in _ALL))
_LARGEST = tl.constexpr(2.0**96)
_NAN = tl.constexpr(2.0**110)
# The columns that each of the 6 pairs keeps: 4 bits each, in one number.
_BITS = tl.constexpr(sum(sum(1 << column for column in pair) << 4 * k for k, pair in enumerate(PAIRS)))


@triton.jit
def _finite(score):
    number = score.to(tl.float32)
    return tl.where(number != number, _NAN, tl.minimum(number, _LARGEST))


@triton.jit
def _pairs(start, step, known):
    """The sums of a row's 6 pairs of columns."""
    a = _finite(tl.load(start, mask=known, other=0))
    b = _finite(tl.load(start + step, mask=known, other=0))
    c = _finite(tl.load(start + 2 * step, mask=known, other=0))
    d = _finite(tl.load(start + 3 * step, mask=known, other=0))
    return a + b, a + c, a + d, b + c, b + d, c + d


@triton.jit
def _keep(
    score, keep, tiles, tiles_in, tiles_out,
    outer_step, out_step, in_step, inner, B: tl.constexpr,
):  # fmt: skip
    """Tiles are counted along (outer, out, in, inner), the last fastest; `inner` lies densely."""
    tile = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    known = tile < tiles
    within = tile % inner
    tile = tile // inner
    column = tile % tiles_in
    row = (tile // tiles_in) % tiles_out
    start = (tile // (tiles_in * tiles_out)) * outer_step + row * 4 * out_step + column * 4 * in_step + within
    one = _pairs(score + start + 2 * out_step, in_step, known)
    two = _pairs(score + start + 3 * out_step, in_step, known)
    best = ()
    which = ()
    for c in tl.static_range(19):
        sums = tl.full([B], -1.0, tl.float32)
        index = tl.zeros([B], tl.int32)
        for t in tl.static_range(36):
            if _CLASS[t] == c:
                other = one[t // 6] + two[t % 6]
                index = tl.where(other > sums, t, index)
                sums = tl.where(other > sums, other, sums)
        best += (sums,)  # type: ignore[assignment]
        which += (index,)  # type: ignore[assignment]
    one = _pairs(score + start, in_step, known)
    two = _pairs(score + start + out_step, in_step, known)
    most = tl.full([B], -1.0, tl.float32)
    upper = tl.zeros([B], tl.int32)
    lower = tl.zeros([B], tl.int32)
    for t in tl.static_range(36):
        total = one[t // 6] + two[t % 6] + best[_MEETS[t]]
        better = total > most
        upper = tl.where(better, t, upper)
        lower = tl.where(better, which[_MEETS[t]], lower)
        most = tl.where(better, total, most)
    for r in tl.static_range(4):
        half = upper if r < 2 else lower
        pair = half // 6 if r % 2 == 0 else half % 6
        bits = (_BITS >> (4 * pair)) & 15
        for c in tl.static_range(4):
            tl.store(keep + start + r * out_step + c * in_step, ((bits >> c) & 1).to(tl.uint8), mask=known)


def foreach_transposable_mask(
    scores: Sequence[Tensor], n: int, m: int, axes: Sequence[int], output_axes: Sequence[int]
) -> list[Tensor]:
    pattern, reduced = parsed(scores, n, m, axes)
    masks = []
    for score, axis, output_axis in zip(scores, reduced, parsed_axes(scores, output_axes), strict=True):
        mask = mask_2_4(score, axis, output_axis) if (n, m) == (2, 4) else None
        masks.append(transposable_mask(score, pattern, axis, output_axis) if mask is None else mask)
    return masks


def mask_2_4(score: Tensor, axis: Axis, output_axis: Axis) -> Tensor | None:
    """The mask of a weight that consists of whole tiles: bool, its strides. None where it does not, or where the kernel
    cannot read it as it lies."""
    whole = all(score.shape[each.dim] // each.blocks % 4 == 0 for each in (axis, output_axis))
    layout = _layout(score, axis.dim, output_axis.dim) if whole else None
    if score.dtype not in KINDS or not score.numel() or layout is None:
        return None
    mask = torch.empty_like(score, dtype=torch.bool)
    if mask.stride() != score.stride():
        return None
    tiles = score.numel() // 16
    with on_device(score.device):
        _keep[(triton.cdiv(tiles, _TILES),)](score, mask.view(torch.uint8), tiles, *layout, _TILES)
    return mask


def _layout(score: Tensor, dim: int, output_axis: int) -> tuple[int, ...] | None:
    """Tiles along the axes, their steps, and what lies densely inside of both: for weights whose memory is
    (outer, the two axes in either order, inner) without gaps."""
    order = sorted(range(score.ndim), key=lambda each: (score.stride(each), score.shape[each] != 1), reverse=True)
    sizes = [score.shape[each] for each in order]
    if any(score.stride(d) != math.prod(sizes[i + 1 :]) for i, d in enumerate(order) if score.shape[d] != 1):
        return None
    a, b = sorted((order.index(dim), order.index(output_axis)))
    if b != a + 1:
        return None
    inner = math.prod(sizes[b + 1 :])
    outer_step = sizes[a] * sizes[b] * inner
    return (
        score.shape[dim] // 4,
        score.shape[output_axis] // 4,
        outer_step,
        score.stride(output_axis),
        score.stride(dim),
        inner,
    )
