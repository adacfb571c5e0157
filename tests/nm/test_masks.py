"""Masks against brute force over subsets; the fast ways against the definitions, for every M, dtype and layout."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor, init_device_mesh

from openwork.nm.groups import Axis, from_rows, to_rows
from openwork.nm.masks import apply_mask, kept_per_group, magnitude_mask, sortable, too_dense, topn, topn_by_count
from openwork.nm.pattern import Pattern

torch.set_num_threads(1)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Rank = Callable[[Tensor, Pattern], Tensor]
INF, NAN = math.inf, math.nan
# The NaN that x86 makes of 0 * inf: its sign bit is set, as `Tensor.abs` would never leave it.
NEGATIVE_NAN = -torch.tensor(NAN).abs()

patterns = st.integers(1, 8).flatmap(lambda m: st.builds(Pattern, st.integers(1, m), st.just(m)))
few = settings(max_examples=60, deadline=None)


def best_subset(group: list[float], n: int) -> tuple[int, ...]:
    """The indices kept, by trying all: the greatest scores (NaN above all), then the lowest indices."""
    rank = [(math.isnan(score), 0.0 if math.isnan(score) else score) for score in group]
    subsets = list(itertools.combinations(range(len(group)), n))
    best = max(sorted((rank[i] for i in subset), reverse=True) for subset in subsets)
    return min(subset for subset in subsets if sorted((rank[i] for i in subset), reverse=True) == best)


def best_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """`best_subset` in each group of the last axis; a short last group keeps its best as well."""
    keep = torch.zeros(score.shape, dtype=torch.bool)
    for row, row_keep in zip(score.reshape(-1, score.shape[-1]), keep.view(-1, score.shape[-1]), strict=True):
        for start in range(0, len(row), pattern.m):
            group = row[start : start + pattern.m].tolist()
            for i in best_subset(group, min(pattern.n, len(group))):
                row_keep[start + i] = True
    return keep


@st.composite
def scores(draw: st.DrawFn, pattern: Pattern, values: list[float], dtype: torch.dtype) -> Tensor:
    size = pattern.m * draw(st.integers(1, 3))
    row = st.lists(st.sampled_from(values), min_size=size, max_size=size)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)), dtype=dtype)


def with_ties(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Non-negative scores of which many are equal, some zero, infinite or NaN of either sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack([*torch.tensor([0.0, -0.0, 1e-7, 0.5, 0.5, 1.0, 1.5, INF, NAN]), NEGATIVE_NAN])
    return values[torch.randint(len(values), shape, generator=generator)].to(dtype)


# --- topn, the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data(), pattern=patterns)
def test_topn_keeps_the_best_subset(dtype: torch.dtype, data: st.DataObject, pattern: Pattern) -> None:
    score = data.draw(scores(pattern, [0.0, -0.0, 1.0, 2.0, -1.0, INF, -INF, NAN], dtype))
    assert torch.equal(topn(score, pattern), best_mask(score, pattern))


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        ([1.0, 3.0, 3.0, 3.0], [1, 2]),
        ([0.0, 0.0, 0.0, 0.0], [0, 1]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 1]),
        ([0.0, NAN, INF, 1.0], [1, 2]),
        ([INF, INF, NAN, NAN], [2, 3]),
        ([NAN, NAN, NAN, NAN], [0, 1]),
        ([INF, 1.0, INF, INF], [0, 2]),
        ([5e-324, 0.0, 0.0, 5e-324], [0, 3]),
    ],
)
@pytest.mark.parametrize("rank", [topn, topn_by_count])
def test_edge_cases(rank: Rank, score: list[float], kept: list[int]) -> None:
    keep = rank(torch.tensor(score, dtype=torch.float64), Pattern(2, 4))
    assert keep.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("rank", [topn, topn_by_count])
def test_groups_do_not_mix(rank: Rank) -> None:
    score = torch.tensor([[1.0, 2.0, 100.0, 101.0], [7.0, 6.0, 0.2, 0.1]])
    assert rank(score, Pattern(1, 2)).tolist() == [[False, True, False, True], [True, False, True, False]]


@pytest.mark.parametrize("rank", [topn, topn_by_count])
@pytest.mark.parametrize("shape", [(6,), (3, 10), (4, 4, 2), ()])
def test_a_size_that_m_does_not_divide_is_refused(rank: Rank, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not a multiple of M=4 .*exclude this layer, or use remainder='pad'"):
        rank(torch.zeros(shape), Pattern(2, 4))


@pytest.mark.parametrize("rank", [topn, topn_by_count])
@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 4)])
def test_no_weights_have_an_empty_mask(rank: Rank, shape: tuple[int, ...]) -> None:
    keep = rank(torch.zeros(shape), Pattern(2, 4))
    assert (keep.shape, keep.dtype) == (shape, torch.bool)


# --- topn_by_count, the fast twin --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data(), pattern=patterns)
def test_counting_keeps_the_best_subset(dtype: torch.dtype, data: st.DataObject, pattern: Pattern) -> None:
    score = data.draw(scores(pattern, [0.0, -0.0, 1.0, 2.0, 1e-7, INF, NAN], dtype))
    assert torch.equal(topn_by_count(score, pattern), best_mask(score, pattern))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 65))
def test_counting_equals_sorting_for_every_m(m: int, dtype: torch.dtype) -> None:
    score = with_ties((5, 3 * m), dtype, seed=m)
    for n in {1, 2, m // 2, m - 1, m} & set(range(1, m + 1)):
        assert torch.equal(topn_by_count(score, Pattern(n, m)), topn(score, Pattern(n, m)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_equals_sorting_of_every_16_bit_float(dtype: torch.dtype) -> None:
    every = torch.arange(0x8000, dtype=torch.int16)  # the non-negative ones, NaN included
    score = every.view(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).to(dtype)
    score = score[torch.randperm(len(score), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(topn_by_count(score, Pattern(3, 8)), topn(score, Pattern(3, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [topn, topn_by_count])
def test_nans_of_all_payloads_are_equal(rank: Rank, dtype: torch.dtype) -> None:
    infinity = bits(torch.tensor([INF], dtype=dtype))
    score = (infinity + torch.arange(4)).to(infinity.dtype).view(dtype)  # infinity, then three NaNs
    assert rank(score, Pattern(2, 4)).tolist() == [False, True, True, False]


LAYOUTS = {
    "transposed": lambda s: s.t().contiguous().t(),
    "every other column": lambda s: s.repeat_interleave(2, 1)[:, ::2],
    "expanded rows": lambda s: s[:1].expand(7, -1),
    "offset": lambda s: torch.cat([s[:1], s])[1:],
    "three dims": lambda s: s.unflatten(0, (2, -1)).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 7), Pattern(1, 16), Pattern(17, 42)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_equals_sorting_in_any_layout(layout: str, pattern: Pattern, dtype: torch.dtype) -> None:
    score = LAYOUTS[layout](with_ties((6, 4 * pattern.m), dtype))
    assert torch.equal(topn_by_count(score, pattern), topn(score.contiguous(), pattern))


@pytest.mark.parametrize("rank", [topn, topn_by_count])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_left_as_they_were(rank: Rank, dtype: torch.dtype) -> None:
    score = with_ties((4, 16), dtype)
    before = bits(score).clone()
    for pattern in (Pattern(2, 4), Pattern(1, 1), Pattern(8, 16)):
        rank(score, pattern)
    assert torch.equal(bits(score), before)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 16), Pattern(40, 48)], ids=str)
def test_counting_compiles_in_one_graph(pattern: Pattern) -> None:
    score = with_ties((6, 2 * pattern.m), torch.float32)
    before = bits(score).clone()
    compiled = torch.compile(topn_by_count, fullgraph=True, backend="eager")
    assert torch.equal(compiled(score, pattern), topn(score, pattern))
    assert torch.equal(bits(score), before)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masking_compiles_to_native_code(dtype: torch.dtype) -> None:
    def masked(weight: Tensor) -> Tensor:
        return apply_mask(weight, magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1)))

    weight = with_ties((8, 8, 3), dtype)
    compiled = torch.compile(masked, fullgraph=True)(weight)
    torch.testing.assert_close(compiled, masked(weight), rtol=0, atol=0, equal_nan=True)


def test_masks_exist_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert magnitude_mask(torch.zeros(4, 6), Pattern(2, 4), Axis(1)).shape == (4, 6)


def test_masks_stay_on_the_device_of_their_score() -> None:
    score = with_ties((4, 8), torch.float32)
    with torch.device("meta"):  # stands for any default device but the score's own
        keep = magnitude_mask(score, Pattern(2, 4), Axis(1))
    assert torch.equal(keep, topn(score, Pattern(2, 4)))


@pytest.mark.parametrize("shape", [(6, 8, 4), (512, 512, 8)], ids=["small", "large"])
@pytest.mark.parametrize("axis", [Axis(1), Axis(2)], ids=str)
def test_weights_sharded_by_rows_are_masked_and_pruned(
    axis: Axis, shape: tuple[int, ...], one_process: DeviceMesh
) -> None:
    weight = odd_weights(shape, torch.float32)
    sharded = distribute_tensor(weight, one_process, [Shard(0)])
    keep = magnitude_mask(sharded.abs(), Pattern(2, 4), axis)
    assert torch.equal(keep.full_tensor(), magnitude_mask(weight.abs(), Pattern(2, 4), axis))
    assert torch.equal(bits(apply_mask(sharded, keep).full_tensor()), bits(apply_mask(weight, keep.full_tensor())))


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_scores_that_are_not_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"dtype torch\.\w+; needed one of torch.float64, torch.float32"):
        topn_by_count(torch.zeros(4, dtype=dtype), Pattern(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sortable_orders_like_the_scores(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ordered = [0.0, info.smallest_normal / 4, info.smallest_normal, 0.5, 1.0, 1 + info.eps, info.max, INF, NAN]
    key = sortable(torch.tensor(ordered, dtype=dtype))
    assert (key.diff() > 0).all()
    assert torch.equal(sortable(torch.stack([torch.tensor(-0.0), NEGATIVE_NAN]).to(dtype)), key[[0, -1]])


# --- magnitude_mask: along any axis, with a remainder --------------------------------------------------------------

AXES = [Axis(0), Axis(1), Axis(2), Axis(3), Axis(0, blocks=2), Axis(1, blocks=3), Axis(flat=True)]


@pytest.mark.parametrize("axis", AXES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    pattern=patterns,
    lengths=st.tuples(*[st.integers(1, 7)] * 4).filter(lambda x: math.prod(x) <= 300),
    seed=st.integers(0, 99),
)
def test_magnitude_mask_is_the_best_subset_of_each_group(
    axis: Axis, pattern: Pattern, lengths: tuple[int, ...], seed: int
) -> None:
    shape = [length * axis.blocks if dim == axis.dim else length for dim, length in enumerate(lengths)]
    score = with_ties(tuple(shape), torch.float32, seed)
    keep = magnitude_mask(score, pattern, axis)
    assert torch.equal(to_rows(keep, axis), best_mask(to_rows(score, axis), pattern))


@pytest.mark.parametrize(
    ("K", "kept"), [(1, [1]), (3, [2]), (4, [2]), (5, [2, 1]), (6, [2, 2]), (7, [2, 2]), (8, [2, 2])]
)
def test_a_short_last_group_keeps_its_n_highest(K: int, kept: list[int]) -> None:
    weight = torch.arange(1.0, K + 1).expand(3, K)
    keep = magnitude_mask(weight, Pattern(2, 4), Axis(1))
    assert kept_per_group(apply_mask(weight, keep), Pattern(2, 4), Axis(1)).tolist() == [kept] * 3


def test_padding_never_takes_the_place_of_a_weight() -> None:
    zeros = torch.tensor([[5.0, 4.0, 3.0, 2.0, 0.0, -0.0]])
    assert magnitude_mask(zeros, Pattern(2, 4), Axis(1)).tolist() == [[True, True, False, False, True, True]]


@pytest.mark.parametrize("layout", [torch.clone, lambda s: s.transpose(0, 1).contiguous().transpose(0, 1)])
@pytest.mark.parametrize("shape", [(130, 96, 10, 10), (3, 2**19), (2**19 + 5, 4), (1, 2**21), (2, 2**21)])
def test_a_large_weight_is_ranked_in_parts_like_the_whole(shape: tuple[int, ...], layout: Callable) -> None:
    score = layout(torch.rand(shape).mul_(10).round_())  # with ties
    whole = topn(score.movedim(1, -1), Pattern(2, 4)).movedim(-1, 1)
    keep = magnitude_mask(score, Pattern(2, 4), Axis(1))
    assert keep.stride() == score.stride()
    assert torch.equal(keep, whole)


@pytest.mark.parametrize("axis", [Axis(0), Axis(0, blocks=2), Axis(1), Axis(flat=True)], ids=str)
def test_a_large_weight_is_ranked_along_its_axis(axis: Axis) -> None:
    score = torch.rand(2**11, 2**10)
    expected = from_rows(topn(to_rows(score, axis), Pattern(2, 4)), axis, tuple(score.shape))
    assert torch.equal(magnitude_mask(score, Pattern(2, 4), axis), expected)


CONV_LAYOUTS = {
    "contiguous": lambda w: w.contiguous(),
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "spatial first": lambda w: w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


@pytest.mark.parametrize("layout", CONV_LAYOUTS)
@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 5)], ids=str)
def test_mask_has_the_values_of_any_layout_and_the_strides_of_its_score(
    layout: str, axis: Axis, pattern: Pattern
) -> None:
    score = with_ties((8, 12, 3, 3), torch.float32)
    strided = CONV_LAYOUTS[layout](score)
    keep = magnitude_mask(strided, pattern, axis)
    assert keep.stride() == strided.stride()
    assert torch.equal(keep, magnitude_mask(score, pattern, axis))


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_convolution_is_ranked_along_its_input_channels(dtype: torch.dtype) -> None:
    score = with_ties((4, 32, 3, 3), dtype).contiguous(memory_format=torch.channels_last)
    expected = topn(score.movedim(1, -1).contiguous(), Pattern(2, 16)).movedim(-1, 1)
    assert torch.equal(magnitude_mask(score, Pattern(2, 16), Axis(1)), expected)


def test_a_slice_has_the_mask_of_its_copy() -> None:
    score = with_ties((8, 16, 3, 3), torch.float32)[::2, 4:12, :, 1:]
    assert torch.equal(
        magnitude_mask(score, Pattern(2, 4), Axis(1)), magnitude_mask(score.clone(), Pattern(2, 4), Axis(1))
    )


def test_rounding_the_weight_may_change_its_mask() -> None:
    """Why masks are made from the weight as forward saw it (`Masked.seen_dtype`)."""
    weight = torch.tensor([[1.0, 1.001], [2.0, 4.0]])  # 1.001 rounds to 1 in bfloat16: a tie, which index 0 wins
    exact, rounded = (magnitude_mask(w.abs(), Pattern(1, 2), Axis(1)) for w in (weight, weight.bfloat16()))
    assert exact.tolist() == [[False, True], [False, True]]
    assert rounded.tolist() == [[True, False], [False, True]]


row_of_11 = st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0, INF, NAN]), min_size=11, max_size=11)


@few
@given(pattern=patterns, rows=st.lists(row_of_11, min_size=1, max_size=3))
def test_kept_per_group_counts_what_is_not_zero(pattern: Pattern, rows: list[list[float]]) -> None:
    groups = [[row[i : i + pattern.m] for i in range(0, len(row), pattern.m)] for row in rows]
    expected = [[sum(value != 0 for value in group) for group in row] for row in groups]
    assert kept_per_group(torch.tensor(rows), pattern, Axis(1)).tolist() == expected
    assert kept_per_group(torch.tensor(rows).t(), pattern, Axis(0)).tolist() == expected


# --- prune -------------------------------------------------------------------------------------------------------


def odd_weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.stack([*torch.tensor([0.0, -0.0, 1.5, -1.5, INF, -INF, NAN, 1e-42]), NEGATIVE_NAN])
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(1))].to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


PRUNE_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", PRUNE_LAYOUTS)
@pytest.mark.parametrize("keep_layout", PRUNE_LAYOUTS)
def test_prune_equals_where_bit_for_bit(dtype: torch.dtype, layout: str, keep_layout: str) -> None:
    weight = PRUNE_LAYOUTS[layout](odd_weights((12, 8), dtype))
    keep = PRUNE_LAYOUTS[keep_layout](torch.rand(12, 8, generator=torch.Generator().manual_seed(2)) > 0.5)
    expected = torch.where(keep, weight, torch.zeros((), dtype=dtype))
    assert torch.equal(bits(apply_mask(weight, keep)), bits(expected))
    assert apply_mask(weight, keep).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_pruned_entries_are_positive_zero(dtype: torch.dtype, requires_grad: bool) -> None:
    weight = odd_weights((16, 16), dtype).requires_grad_(requires_grad)
    keep = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) > 0.5
    gone = apply_mask(weight, keep)[~keep]
    assert gone.numel() > 100
    assert (gone == 0).all()
    assert not torch.signbit(gone).any()


def test_prune_leaves_its_inputs_and_shares_no_memory() -> None:
    weight, keep = torch.randn(4, 4), torch.rand(4, 4) > 0.5
    before = weight.clone(), keep.clone()
    apply_mask(weight, keep).fill_(7)
    assert torch.equal(weight, before[0])
    assert torch.equal(keep, before[1])


def test_prune_of_dtypes_without_bits_selects_as_well() -> None:
    weight, keep = torch.tensor([1 + 2j, -3j]), torch.tensor([False, True])
    assert apply_mask(weight, keep).tolist() == [0, -3j]


def test_prune_is_differentiable() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(3, 4) > 0.5
    assert torch.autograd.gradcheck(lambda w: apply_mask(w, keep), weight, check_forward_ad=True)
    apply_mask(weight, keep).sum().backward()
    assert torch.equal(weight.grad, keep.double())


def test_prune_is_differentiable_by_function_transforms() -> None:
    weight, keep = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    assert torch.equal(torch.func.grad(lambda w: apply_mask(w, keep).sum())(weight), keep.float())
    _, tangent = torch.func.jvp(lambda w: apply_mask(w, keep), (weight,), (torch.full_like(weight, 2.0),))
    assert torch.equal(tangent, 2.0 * keep)
    assert torch.equal(torch.vmap(apply_mask)(weight, keep), apply_mask(weight, keep))


def test_prune_does_without_autograd_where_none_is_asked_for() -> None:
    weight, keep = torch.randn(4, 4, requires_grad=True), torch.rand(4, 4) > 0.5
    with torch.no_grad():
        assert not apply_mask(weight, keep).requires_grad
    assert not apply_mask(weight.detach(), keep).requires_grad


def test_too_dense_counts_the_groups_that_hold_more_than_n() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0, 5.0], [1.0, 2.0, 3.0, 4.0, 0.0], [1.0, 2.0, -3.0, 0.0, 0.0]])
    assert too_dense(weight, Pattern(2, 4), Axis(1)) == "2 of 6 groups hold more than 2 of 4 (the worst 4)"
    assert too_dense(weight, Pattern(4, 4), Axis(1)) == ""
    assert too_dense(weight, Pattern(2, 3), Axis(0)) == "2 of 5 groups hold more than 2 of 3 (the worst 3)"
    assert too_dense(weight[:0], Pattern(2, 4), Axis(1)) == ""
