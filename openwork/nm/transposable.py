"""Transposable masks: N:M along the reduction axis and along the output axis, so that the transposed weight is N:M as
well (Hubara et al., 2021, arXiv:2102.08124). Then both the product of the forward pass and that of the gradient of its
input, which multiplies with the transposed weight, can run sparse.

    T = tiles, M = tile size; a tile is M outputs (its rows) by M inputs (its columns), and N of each row and of each
    column are kept
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern, check_pattern
from openwork.nm.sinkhorn import best_approximate

_EXACT = 4  # the largest M that is solved exactly
_LARGEST, _NAN = 2.0**96, 2.0**110  # what stands for infinity and NaN: their sums stay finite
_PART = {"cpu": 2**12}  # tiles at a time: the temporary tensors stay in the cache
_PART_ELSEWHERE = 2**18

Pairs = tuple[tuple[int, int], ...]
PAIRS: Pairs = tuple(itertools.combinations(range(4), 2))
"""The rows of a 2:4 tile, in the order in which ties are decided."""


def topn_transposable(score: Tensor, pattern: Pattern) -> Tensor:
    """Keep N of every M scores along the last axis and along the one before it, with the largest sum that can be found:
    (..., O, K) -> bool (..., O, K).

    Exactly N survive in every group of either axis. Up to M = 4 the sum is the largest possible; above, it is within
    about a percent of it (`openwork.nm.sinkhorn`). Of equal sums the mask whose first rows keep the lower indices is
    taken, on every device, where M <= 4. NaN counts as the largest. Scores are non-negative or NaN. Raises ValueError
    where M does not divide an axis.

    >>> topn_transposable(torch.tensor([[3.0, 2.0], [4.0, 1.0]]), Pattern(1, 2)).int()
    tensor([[0, 1],
            [1, 0]], dtype=torch.int32)
    """
    check_pattern(pattern)
    if score.ndim < 2 or score.shape[-1] % pattern.m or score.shape[-2] % pattern.m:
        raise ValueError(
            f"shape {tuple(score.shape)}: the last two axes must be multiples of M={pattern.m}; exclude this layer, or "
            "use remainder='pad'"
        )
    return transposable_mask(score, pattern, Axis(score.ndim - 1), Axis(score.ndim - 2))


def transposable_mask(score: Tensor, pattern: Pattern, axis: Axis, output_axis: Axis) -> Tensor:
    """The transposable mask of a weight from its scores: bool, shape and strides of `score`. `axis` is the reduction
    axis, `output_axis` the output axis. Tiles end where the blocks of an axis end.

    Where M does not divide an axis, its last tiles are filled with zeros: their groups keep N or fewer.
    """
    mask = torch.empty_like(score, dtype=torch.bool)
    if not score.is_meta:
        _fill(mask, score, pattern, axis, output_axis)
    return mask


def _fill(mask: Tensor, score: Tensor, pattern: Pattern, axis: Axis, output_axis: Axis) -> None:
    """Write the transposable mask of `score` to `mask`."""
    for blocked in (axis, output_axis):
        if blocked.blocks > 1 and score.shape[blocked.dim] // blocked.blocks % pattern.m:
            inner = [Axis(each.dim + 1, 1 if each is blocked else each.blocks) for each in (axis, output_axis)]
            return _fill(_blocks_first(mask, blocked), _blocks_first(score, blocked), pattern, *inner)
    short = [(each.dim, -score.shape[each.dim] % pattern.m) for each in (output_axis, axis)]
    padded = _padded(score, short)
    tiles = _tiles(padded, pattern.m, axis, output_axis)
    chosen = mask if padded is score else torch.empty_like(padded, dtype=torch.bool)
    _tiles(chosen, pattern.m, axis, output_axis).copy_(
        best_tiles(tiles.reshape(-1, pattern.m, pattern.m), pattern).view(tiles.shape)
    )
    if padded is not score:
        for dim, missing in short:
            chosen = chosen.narrow(dim, 0, chosen.shape[dim] - missing)
        mask.copy_(chosen)
    return None


def _blocks_first(weight: Tensor, axis: Axis) -> Tensor:
    """A view with the blocks of an axis as a further dim, the first: every other dim is one later."""
    return weight.unflatten(axis.dim, (axis.blocks, -1)).movedim(axis.dim, 0)


def best_tiles(score_TMM: Tensor, pattern: Pattern) -> Tensor:
    """The best mask of each tile: (T, M, M) -> bool (T, M, M)."""
    if pattern.is_dense:
        return torch.ones_like(score_TMM, dtype=torch.bool)
    part = _PART.get(score_TMM.device.type, _PART_ELSEWHERE)
    solve = best_2_4 if (pattern.n, pattern.m) == (2, 4) else _best_listed if pattern.m <= _EXACT else best_approximate
    parts = score_TMM.split(part) if len(score_TMM) else (score_TMM,)
    return torch.cat([solve(finite(part), pattern) for part in parts])


def finite(score: Tensor) -> Tensor:
    """Scores whose sums order as wished: single precision at least, NaN above everything, infinity above what is
    reasonable."""
    exact = score if score.dtype == torch.float64 else score.float()
    return exact.clamp(max=_LARGEST).nan_to_num(nan=_NAN)


def best_2_4(score_TMM: Tensor, _: Pattern = Pattern(2, 4)) -> Tensor:
    """The 2:4 mask of largest sum of each 4x4 tile, out of all 90: finite (T, 4, 4) -> bool (T, 4, 4).

    A row is one of 6 pairs of columns. Rows 0 and 1, and rows 2 and 3, are 36 combinations each, which fall into 19
    classes by how often they keep each column; the upper half meets the best lower half of the class that complements
    it. That is 24 + 72 + 36 additions and 17 + 35 comparisons for 16 weights; trying all masks takes 630 additions.
    """
    tables = _tables(score_TMM.device)
    score_RCT = score_TMM.permute(1, 2, 0).contiguous()
    pair_RPT = score_RCT[:, tables.first] + score_RCT[:, tables.second]
    upper_PT = (pair_RPT[0, :, None] + pair_RPT[1, None]).flatten(0, 1)
    lower_PT = (pair_RPT[2, :, None] + pair_RPT[3, None]).flatten(0, 1)
    best_CT, which_CT = _best_of_class(lower_PT, tables)
    upper_T = (upper_PT + best_CT[tables.meets]).argmax(0)
    lower_T = which_CT.gather(0, tables.meets[upper_T][None])[0]
    return tables.masks[upper_T * 36 + lower_T].view(-1, 4, 4)


def _best_of_class(lower_PT: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """The largest sum of each of the 19 classes, and the combination that has it: the first of equal ones."""
    best_CT = lower_PT[tables.members[0]]
    which_CT = tables.members[0][:, None].expand_as(best_CT).clone()
    for members in tables.members[1:]:  # classes are sorted by size, so these are the first ones
        rows = slice(len(members))
        other = lower_PT[members]
        better = other > best_CT[rows]
        best_CT[rows] = torch.where(better, other, best_CT[rows])
        which_CT[rows] = torch.where(better, members[:, None], which_CT[rows])
    return best_CT, which_CT


class _Tables:
    """What the solver looks up. `members[k]`: the k-th combination of each class that has so many, classes sorted by
    size; `meets`: for each upper combination the class that complements it; `masks`: row 36 * upper + lower."""

    def __init__(self, device: torch.device):
        classes = classes_of_pairs()
        most = len(classes[0][1])
        place = {columns: index for index, (columns, _) in enumerate(classes)}
        combinations = list(itertools.product(range(6), repeat=2))
        meets = [place[tuple(2 - count for count in columns_of(*each))] for each in combinations]
        masks = torch.zeros(36, 36, 4, 4, dtype=torch.bool)
        for row, part in enumerate((0, 0, 1, 1)):
            for index, each in enumerate(combinations):
                masks.select(part, index)[..., row, list(PAIRS[each[row % 2]])] = True
        self.first = torch.tensor([a for a, _ in PAIRS], device=device)
        self.second = torch.tensor([b for _, b in PAIRS], device=device)
        members = [[each[k] for _, each in classes if len(each) > k] for k in range(most)]
        self.members = [torch.tensor(each, device=device) for each in members]
        self.meets = torch.tensor(meets, device=device)
        self.masks = masks.view(-1, 16).to(device)


@functools.cache
def _tables(device: torch.device) -> _Tables:
    return _Tables(device)


def columns_of(p: int, q: int) -> tuple[int, ...]:
    """How often two rows of a tile, the p-th and q-th of `PAIRS`, keep each column.

    >>> columns_of(0, 1)
    (2, 1, 1, 0)
    """
    return tuple((column in PAIRS[p]) + (column in PAIRS[q]) for column in range(4))


@functools.cache
def classes_of_pairs() -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(columns, combinations 6 p + q with those columns) of the 19 classes, the largest first."""
    members: dict[tuple[int, ...], list[int]] = {}
    for p, q in itertools.product(range(6), repeat=2):
        members.setdefault(columns_of(p, q), []).append(6 * p + q)
    classes = [(columns, tuple(combinations)) for columns, combinations in members.items()]
    return tuple(sorted(classes, key=lambda entry: -len(entry[1])))


def _best_listed(score_TMM: Tensor, pattern: Pattern) -> Tensor:
    """The same for any small pattern, by trying every mask: 24 of them at 1:4 and at 3:4."""
    masks_PMM = all_masks(pattern).to(score_TMM.device)
    kept_PE = masks_PMM.flatten(1).nonzero()[:, 1].view(len(masks_PMM), -1)
    score_ET = score_TMM.flatten(1).t().contiguous()
    total_PT = score_ET[kept_PE[:, 0]]
    for entry in range(1, kept_PE.shape[1]):
        total_PT += score_ET[kept_PE[:, entry]]
    return masks_PMM[total_PT.argmax(0)]


@functools.cache
def all_masks(pattern: Pattern) -> Tensor:
    """Every transposable mask of one tile: bool (P, M, M). First come those whose first rows keep the lower indices.

    >>> [len(all_masks(Pattern(n, 4))) for n in (1, 2, 3, 4)]
    [24, 90, 24, 1]
    """
    rows = list(itertools.combinations(range(pattern.m), pattern.n))
    masks = [
        [[column in row for column in range(pattern.m)] for row in mask]
        for mask in itertools.product(rows, repeat=pattern.m)
        if all(sum(column in row for row in mask) == pattern.n for column in range(pattern.m))
    ]
    return torch.tensor(masks)


def _padded(score: Tensor, short: list[tuple[int, int]]) -> Tensor:
    if not any(missing for _, missing in short):
        return score
    sizes = [0] * (2 * score.ndim)
    for dim, missing in short:
        sizes[2 * (score.ndim - 1 - dim) + 1] = missing
    return torch.nn.functional.pad(score, sizes)


def _tiles(weight: Tensor, m: int, axis: Axis, output_axis: Axis) -> Tensor:
    """The weight cut into tiles, a view: (..., M outputs, M inputs)."""
    later, sooner = max(axis.dim, output_axis.dim), min(axis.dim, output_axis.dim)
    cut = weight.unflatten(later, (-1, m)).unflatten(sooner, (-1, m))
    inner = {sooner: sooner + 1, later: later + 2}
    return cut.movedim((inner[output_axis.dim], inner[axis.dim]), (-2, -1))
