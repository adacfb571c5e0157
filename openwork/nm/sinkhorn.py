"""Transposable masks of any N:M, nearly optimal, on all tiles at once (in the manner of TSENOR, arXiv:2505.23949).

Choosing N entries of every row and column of a tile with the largest sum is a transportation problem. With a little
entropy added, its relaxation to the numbers in [0, 1] is solved by scaling rows, scaling columns and cutting at 1 in
turn (Dykstra's projections). The plan is then rounded to a mask that has exactly N in every row and column, and the
mask improved where two rows or two columns can exchange what they keep. Plain tensor operations, the same number for
every tile.

    T = tiles, M = tile size
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.nm.pattern import Pattern

# Chosen on tiles of normal weights at 4:8, 8:16 and 1:16: a quarter of the iterations, or of the sharpness, loses up to
# 0.4 % of the sum, more sweeps gain less than 0.01 %.
_SHARPNESS = 80.0
_ITERATIONS = 200
_SWEEPS = 1


def best_approximate(score_TMM: Tensor, pattern: Pattern) -> Tensor:
    """A mask of nearly the largest sum for each tile, exactly N in every row and column: finite, non-negative
    (T, M, M) -> bool (T, M, M)."""
    if not len(score_TMM):
        return torch.zeros_like(score_TMM, dtype=torch.bool)
    score_TMM = score_TMM / score_TMM.amax((1, 2), keepdim=True).clamp(min=torch.finfo(score_TMM.dtype).tiny)
    plan_TMM = transport_plan(score_TMM, pattern.n)
    mask_TMM = completed(rounded_mask(plan_TMM + 1e-3 * score_TMM, pattern.n), score_TMM, pattern.n)
    return improved(mask_TMM, score_TMM)


def transport_plan(
    score_TMM: Tensor, n: int, *, sharpness: float = _SHARPNESS, iterations: int = _ITERATIONS
) -> Tensor:
    """How much of each entry the relaxed problem keeps, in [0, 1]: scores in [0, 1], (T, M, M) -> (T, M, M).

    Maximizes sum(plan * score) + entropy(plan) / sharpness where all rows and columns of the plan sum to N.
    """
    plan = (sharpness * (score_TMM - score_TMM.amax(2, keepdim=True))).exp_()
    cut = torch.ones_like(plan)  # what cutting at 1 took away, given back before the next cut
    for _ in range(iterations):
        plan *= n / plan.sum(2, keepdim=True)
        plan *= n / plan.sum(1, keepdim=True)
        plan *= cut
        cut = plan.clamp(min=1.0)
        plan.clamp_(max=1.0)
    return plan


def rounded_mask(plan_TMM: Tensor, n: int) -> Tensor:
    """Keep the entries of a plan from the largest down, where their row and column still have room: at most N in each,
    (T, M, M) -> bool (T, M, M)."""
    T, M, _ = plan_TMM.shape
    order_TE = plan_TMM.flatten(1).argsort(dim=1, descending=True, stable=True)
    row_ET, column_ET = (order_TE // M).t().contiguous(), (order_TE % M).t().contiguous()
    free_rows_MT = torch.full((M, T), n, dtype=torch.int32, device=plan_TMM.device)
    free_columns_MT = free_rows_MT.clone()
    taken_ET = torch.zeros_like(row_ET, dtype=torch.bool)
    for entry, (row, column) in enumerate(zip(row_ET[:, None], column_ET[:, None], strict=True)):
        fits = (free_rows_MT.gather(0, row) > 0) & (free_columns_MT.gather(0, column) > 0)
        taken_ET[entry] = fits[0]
        free_rows_MT.scatter_add_(0, row, -fits.int())
        free_columns_MT.scatter_add_(0, column, -fits.int())
    return torch.zeros_like(taken_ET.t()).scatter_(1, order_TE, taken_ET.t()).view(T, M, M)


def completed(mask_TMM: Tensor, score_TMM: Tensor, n: int) -> Tensor:
    """A mask that keeps at most N, filled up to exactly N in every row and column of each tile.

    As long as a row and a column lack entries, either an entry where such two meet is free and is added; or each such
    two meet in a kept entry, and then some kept entry (i', j') can give way to (i, j') and (i', j) for a row i and a
    column j that lack one. There is one: i has M - N + 1 free columns or more and j as many free rows. Were nothing
    kept where they cross, the column j' of a free entry of row i would be kept only in rows where j is kept, at most
    N - 1, of which row i is one that does not keep j'. So j' would lack entries too, and (i, j') would have been free
    to add.
    """
    mask_TMM = mask_TMM.clone()
    while True:
        lacking = (mask_TMM.sum(2) < n).any(1).nonzero()[:, 0]
        if not len(lacking):
            return mask_TMM
        mask_TMM[lacking] = _with_one_more(mask_TMM[lacking], score_TMM[lacking], n)


def _with_one_more(mask: Tensor, score: Tensor, n: int) -> Tensor:
    T, M, _ = mask.shape
    short_row, short_column = mask.sum(2) < n, mask.sum(1) < n
    every = torch.arange(T, device=mask.device)
    free = short_row[:, :, None] & short_column[:, None, :] & ~mask
    addable = free.flatten(1).any(1)
    best = _first_best(score, free)
    i, j = short_row.int().argmax(1), short_column.int().argmax(1)
    swaps = mask & ~mask[every, i][:, None, :] & ~mask[every, :, j][:, :, None]
    gain = score[every, i][:, None, :] + score[every, :, j][:, :, None] - score
    swap = _first_best(gain, swaps)
    mask = mask.clone()
    mask[every[addable], (best // M)[addable], (best % M)[addable]] = True
    every, i, j, swap = every[~addable], i[~addable], j[~addable], swap[~addable]
    mask[every, swap // M, swap % M] = False
    mask[every, i, swap % M] = True
    mask[every, swap // M, j] = True
    return mask


def _first_best(value_TMM: Tensor, allowed_TMM: Tensor) -> Tensor:
    return value_TMM.masked_fill(~allowed_TMM, -torch.inf).flatten(1).argmax(1)


def improved(mask_TMM: Tensor, score_TMM: Tensor, *, sweeps: int = _SWEEPS) -> Tensor:
    """A mask of no smaller sum, where any two rows, and any two columns, have shared their entries in the best way."""
    for _ in range(sweeps):
        before = mask_TMM
        mask_TMM = _rows_exchanged(mask_TMM, score_TMM)
        mask_TMM = _rows_exchanged(mask_TMM.mT, score_TMM.mT).mT
        if torch.equal(mask_TMM, before):
            break
    return mask_TMM


def _rows_exchanged(mask_TMM: Tensor, score_TMM: Tensor) -> Tensor:
    """Every two rows in turn, M / 2 pairs of them at a time. Of the columns that only one of the two keeps, each row
    takes as many as it had, those that it gains most from."""
    mask_TMM = mask_TMM.clone()
    for a, b in rounds(mask_TMM.shape[1]):
        one, two = mask_TMM[:, a], mask_TMM[:, b]
        either = one ^ two
        gain = (score_TMM[:, a] - score_TMM[:, b]).masked_fill(~either, -torch.inf)
        rank = gain.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        mine = either & (rank < (one & either).sum(-1, keepdim=True))
        mask_TMM[:, a] = mine | (one & two)
        mask_TMM[:, b] = (either & ~mine) | (one & two)
    return mask_TMM


def rounds(m: int) -> list[tuple[list[int], list[int]]]:
    """Every two of M rows once, in rounds in which each row meets one other: the circle method of tournaments.

    >>> rounds(4)
    [([0, 1], [3, 2]), ([0, 3], [2, 1]), ([0, 2], [1, 3])]
    """
    players = [*range(m), *([-1] if m % 2 else [])]
    pairings = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [pair for pair in zip(players[:half], players[: half - 1 : -1], strict=True) if -1 not in pair]
        pairings.append(([a for a, _ in pairs], [b for _, b in pairs]))
        players = [players[0], players[-1], *players[1:-1]]
    return pairings
