"""Transposable masks: the exact ones against all masks there are, the others against a linear program's optimum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

import openwork as ow
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group
from openwork.nm.sinkhorn import best_approximate, completed, improved, rounded_mask, rounds
from openwork.nm.transposable import (
    all_masks,
    best_2_4,
    best_tiles,
    classes_of_pairs,
    finite,
    transposable_mask,
)

torch.set_num_threads(1)

TWO_OF_FOUR = ow.Pattern(2, 4)


def every_mask(n, m):
    """All transposable masks by trying every choice of rows, those with the lower indices in their first rows first."""
    rows = list(itertools.combinations(range(m), n))
    for chosen in itertools.product(rows, repeat=m):
        if all(sum(j in row for row in chosen) == n for j in range(m)):
            yield [[j in row for j in range(m)] for row in chosen]


def best_by_trying(tile, n, m):
    """The first of the masks with the largest sum. The sums are of small integers here, so they are exact."""
    best, most = None, -1.0
    for mask in every_mask(n, m):
        total = sum(tile[i][j] for i in range(m) for j in range(m) if mask[i][j])
        if total > most:
            best, most = mask, total
    return best


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(seed, *shape, high=4):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def check_exact(keep, pattern, axis, output_axis):
    for each in (axis, output_axis):
        assert (kept_per_group(keep, pattern, each) == pattern.n).all()


# --- exact masks ---------------------------------------------------------------------------------------------------


def test_the_ninety_masks_and_nineteen_classes():
    assert len(list(every_mask(2, 4))) == len(all_masks(TWO_OF_FOUR)) == 90
    sizes = [len(members) for _, members in classes_of_pairs()]
    assert sizes == [6, *[2] * 12, *[1] * 6]
    of = dict(classes_of_pairs())
    assert sum(len(each) * len(of[tuple(2 - c for c in columns)]) for columns, each in of.items()) == 90


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), high=st.sampled_from([2, 3, 8, 1000]))
def test_2_4_is_the_first_of_the_best_of_all_masks(seed, high):
    tiles = drawn(seed, 3, 4, 4, high=high)
    assert best_2_4(tiles).tolist() == [best_by_trying(tile, 2, 4) for tile in tiles.tolist()]


@pytest.mark.parametrize("pattern", ["1:2", "1:3", "2:3", "1:4", "3:4"])
def test_other_small_patterns_are_the_best_of_all_masks(pattern):
    pattern = ow.Pattern.parse(pattern)
    tiles = drawn(1, 30, pattern.m, pattern.m)
    assert best_tiles(tiles, pattern).tolist() == [best_by_trying(t, pattern.n, pattern.m) for t in tiles.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_2_4_has_the_largest_sum_of_any_dtype(dtype):
    tiles = draw(300, 4, 4).abs().to(dtype)
    sums = (tiles.double()[:, None] * all_masks(TWO_OF_FOUR)).sum((2, 3)).amax(1)
    found = (tiles.double() * best_tiles(tiles, TWO_OF_FOUR)).sum((1, 2))
    torch.testing.assert_close(found, sums, rtol=1e-6, atol=0)


def test_equal_weights_keep_the_lower_indices_of_the_first_rows():
    keep = best_tiles(torch.zeros(1, 4, 4), TWO_OF_FOUR)[0]
    assert keep.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_mask_of_the_transpose_keeps_as_much_and_all_is_kept_at_m_of_m():
    tiles = draw(100, 4, 4).abs()
    one, two = ((t * best_2_4(t)).sum((1, 2)) for t in (tiles, tiles.mT))
    torch.testing.assert_close(one, two)
    assert best_tiles(tiles, ow.Pattern(4, 4)).all()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_nan_is_kept_and_infinity_before_numbers(pattern):
    pattern = ow.Pattern.parse(pattern)
    tiles = draw(50, pattern.m, pattern.m).abs()
    tiles[:, 1, 2], tiles[:, 3, 0] = torch.nan, torch.inf
    keep = best_tiles(tiles, pattern)
    assert keep[:, 1, 2].all()
    assert keep[:, 3, 0].all()
    check_exact(keep, pattern, Axis(2), Axis(1))
    every = best_tiles(torch.full((2, pattern.m, pattern.m), torch.nan), pattern)
    check_exact(every, pattern, Axis(2), Axis(1))
    assert finite(torch.tensor([torch.nan, torch.inf, 3e38])).isfinite().all()


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "output_axis"),
    [
        ((8, 12), Axis(1), Axis(0)),
        ((8, 12), Axis(0), Axis(1)),
        ((8, 4, 3, 3), Axis(1), Axis(0, blocks=2)),
        ((8, 4, 2), Axis(0, blocks=2), Axis(1)),
        ((3, 4, 8), Axis(2), Axis(1)),
        ((3, 4, 8), Axis(1), Axis(2)),
    ],
)
def test_each_tile_of_a_weight_is_solved_alone(shape, axis, output_axis):
    score = draw(*shape).abs()
    keep = transposable_mask(score, TWO_OF_FOUR, axis, output_axis)
    check_exact(keep, TWO_OF_FOUR, axis, output_axis)
    flat = score.movedim((output_axis.dim, axis.dim), (-2, -1)).flatten(0, -3) if len(shape) > 2 else score[None]
    flat = flat if len(shape) > 2 or axis.dim == 1 else score.t()[None]
    mask = keep.movedim((output_axis.dim, axis.dim), (-2, -1)).flatten(0, -3) if len(shape) > 2 else keep[None]
    mask = mask if len(shape) > 2 or axis.dim == 1 else keep.t()[None]
    for matrix, kept in zip(flat, mask, strict=True):
        assert torch.equal(kept[:4, -4:], best_2_4(matrix[:4, -4:][None])[0])


def test_strides_stay_and_do_not_matter():
    score = draw(8, 8, 3, 3).abs()
    last = score.contiguous(memory_format=torch.channels_last)
    found = transposable_mask(last, TWO_OF_FOUR, Axis(1), Axis(0))
    assert found.stride() == last.stride()
    assert torch.equal(found, transposable_mask(score, TWO_OF_FOUR, Axis(1), Axis(0)))


def test_tiles_that_stick_out_keep_n_or_fewer():
    score = draw(6, 10).abs()
    keep = transposable_mask(score, TWO_OF_FOUR, Axis(1), Axis(0))
    padded = torch.nn.functional.pad(score, (0, 2, 0, 2))
    assert torch.equal(keep, transposable_mask(padded, TWO_OF_FOUR, Axis(1), Axis(0))[:6, :10])
    assert int(kept_per_group(keep, TWO_OF_FOUR, Axis(0)).max()) == 2


@pytest.mark.parametrize(
    ("shape", "axis", "output_axis"),
    [
        ((12, 8, 3), Axis(1), Axis(0, blocks=2)),  # a convolution of two groups
        ((12, 8, 3), Axis(0, blocks=2), Axis(1)),  # a transposed one
        ((10, 12), Axis(0, blocks=2), Axis(1, blocks=3)),
    ],
)
def test_tiles_end_where_a_convolution_s_groups_end(shape, axis, output_axis):
    score = draw(*shape).abs()
    keep = transposable_mask(score, TWO_OF_FOUR, axis, output_axis)
    for scores, kept in zip(blocks(score, axis, output_axis), blocks(keep, axis, output_axis), strict=True):
        assert torch.equal(kept, transposable_mask(scores, TWO_OF_FOUR, Axis(axis.dim), Axis(output_axis.dim)))
    for each in (axis, output_axis):
        assert int(kept_per_group(keep, TWO_OF_FOUR, each).max()) == 2


def blocks(weight, *axes):
    """The parts of a weight that are no groups of one another."""
    parts = [weight]
    for axis in axes:
        parts = [piece for part in parts for piece in part.chunk(axis.blocks, axis.dim)]
    return parts


def test_the_public_function_takes_batches_and_refuses_what_does_not_divide():
    score = draw(2, 8, 4).abs()
    assert torch.equal(ow.topn_transposable(score, TWO_OF_FOUR)[1], ow.topn_transposable(score[1], TWO_OF_FOUR))
    with pytest.raises(ValueError, match=r"shape \(6, 8\): the last two axes must be multiples of M=4"):
        ow.topn_transposable(torch.ones(6, 8), TWO_OF_FOUR)


def test_the_operator_is_registered_rightly():
    arguments = ([draw(8, 8).abs(), draw(6, 8, 3).abs()], 2, 4, [1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 2, 0])
    torch.library.opcheck(torch.ops.openwork.foreach_transposable_mask.default, arguments)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("openwork::foreach_transposable_mask", "CUDA")


# --- the entropic solver -------------------------------------------------------------------------------------------


def optimum(score, n):
    """The largest sum of one tile: the linear program is integral, as its matrix is totally unimodular."""
    m = len(score)
    matrix = sparse.vstack([sparse.kron(sparse.eye(m), np.ones(m)), sparse.kron(np.ones(m), sparse.eye(m))])
    return -linprog(-score.double().numpy().ravel(), A_eq=matrix, b_eq=np.full(2 * m, n), bounds=(0, 1)).fun


@pytest.mark.parametrize(
    ("pattern", "share"),
    [("2:4", 0.9999), ("4:8", 0.9995), ("8:16", 0.9993), ("1:16", 0.996), ("3:7", 0.999), ("2:5", 0.999)],
)
def test_it_is_exact_in_rows_and_columns_and_close_to_the_optimum(pattern, share):
    pattern = ow.Pattern.parse(pattern)
    tiles = draw(40, pattern.m, pattern.m, seed=3).abs()
    keep = best_approximate(tiles, pattern)
    check_exact(keep, pattern, Axis(2), Axis(1))
    best = sum(optimum(tile, pattern.n) for tile in tiles)
    assert share * best <= float((keep * tiles).sum()) <= best * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(2, 9), seed=st.integers(0, 999), kind=st.sampled_from(["zeros", "few", "wild"])
)
def test_it_is_exact_on_hostile_tiles(n, m, seed, kind):
    pattern = ow.Pattern(min(n, m), m)
    tiles = drawn(seed, 4, m, m, high=2) * (10.0 ** drawn(seed + 1, 4, m, m, high=60) if kind == "wild" else 1.0)
    tiles = tiles if kind != "zeros" else torch.zeros_like(tiles)
    check_exact(best_tiles(tiles, pattern), pattern, Axis(2), Axis(1))
    check_exact(best_approximate(finite(tiles), pattern), pattern, Axis(2), Axis(1))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(2, 8), seed=st.integers(0, 999))
def test_what_rounding_leaves_open_is_completed(n, m, seed):
    n = min(n, m)
    score = draw(8, m, m, seed=seed).abs()
    some = rounded_mask(draw(8, m, m, seed=seed + 1), n)  # of an unrelated order: gaps to fill
    assert int(some.sum(1).max()) <= n
    assert int(some.sum(2).max()) <= n
    keep = completed(some, score, n)
    check_exact(keep, ow.Pattern(n, m), Axis(2), Axis(1))
    better = improved(keep, score)
    check_exact(better, ow.Pattern(n, m), Axis(2), Axis(1))
    assert ((score * better).sum((1, 2)) >= (score * keep).sum((1, 2)) - 1e-5).all()


@pytest.mark.parametrize("m", [2, 5, 8])
def test_every_two_rows_meet_once(m):
    met = [frozenset(pair) for a, b in rounds(m) for pair in zip(a, b, strict=True)]
    assert sorted(map(sorted, met)) == [[i, j] for i in range(m) for j in range(i + 1, m)]


def test_no_tiles_give_no_masks():
    for pattern in ("2:4", "1:4", "4:8"):
        m = ow.Pattern.parse(pattern).m
        assert best_tiles(torch.zeros(0, m, m), ow.Pattern.parse(pattern)).shape == (0, m, m)
