"""What is told of a weight, on every instruction set, against the definitions: any order of dims, gaps, odd numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openwork.kernels.cpu import counts
from openwork.nm import masks
from openwork.nm.groups import Axis
from openwork.nm.masks import GroupCounts, apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "1:2", "4:8", "1:16", "3:7", "5:33", "32:64", "1:1")]
PLACES = [
    ((5, 64), Axis(1)),
    ((5, 67), Axis(1)),
    ((67, 5), Axis(0)),
    ((3, 40, 3, 3), Axis(1)),
    ((24, 5, 2, 2), Axis(0, blocks=3)),
    ((3, 5, 8), Axis(flat=True)),
    ((2, 3, 70), Axis(-1)),
]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40]


def special(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.where(torch.rand(shape, generator=generator) < 0.3, 0.0, weight)
    chosen = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.1, chosen, weight).to(dtype)


def laid_out(weight: Tensor) -> list[Tensor]:
    """The same numbers: as they are, with the dims in the opposite order in memory, and with gaps."""
    order = tuple(reversed(range(weight.ndim)))
    gaps = torch.full([2 * size for size in weight.shape], 7, dtype=weight.dtype)[(slice(None, None, 2),) * weight.ndim]
    return [weight, weight.permute(order).contiguous().permute(order), gaps.copy_(weight)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_are_those_of_the_definition(isa: str, pattern: Pattern) -> None:
    for seed, (shape, axis) in enumerate(PLACES):
        for dtype in FLOATS:
            for weight in laid_out(special(shape, dtype, seed)):
                expected = masks.group_counts(weight, pattern, axis)
                assert counts.group_counts(weight, pattern, axis) == expected, (shape, dtype)
                assert counts.too_dense(weight, pattern, axis) == masks.too_dense(weight, pattern, axis)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_count_too(isa: str, dtype: torch.dtype) -> None:
    for shape, axis in PLACES:
        weight = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for each in laid_out(weight):
            assert counts.group_counts(each, Pattern(2, 4), axis) == masks.group_counts(each, Pattern(2, 4), axis)
    lowest = torch.full((1, 4), torch.iinfo(torch.int8).min, dtype=torch.int8)  # whose other bits are all zero
    assert counts.group_counts(lowest, Pattern(2, 4), Axis(1)) == GroupCounts(4, 1, 1, 4)


def test_large_weights_are_counted_in_parts(isa: str) -> None:
    weight = torch.zeros(600, 1000)
    weight[599, 997:] = weight[0, :3] = 1.0
    assert counts.group_counts(weight, Pattern(2, 4), Axis(1)) == GroupCounts(6, 150_000, 2, 3)


def test_other_tensors_are_counted_by_the_definition(isa: str) -> None:
    for weight in (torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(2, 4, device="meta"), torch.zeros(2, 8)[:, ::2]):
        if not weight.is_meta:
            found = counts.group_counts(weight, Pattern(2, 4), Axis(1))
            assert found == masks.group_counts(weight, Pattern(2, 4), Axis(1))
        assert counts._native(weight, Pattern(2, 4), Axis(1), (torch.float32,)) is None
    float8 = torch.tensor([[1.0, 0.0, 2.0, 3.0]]).to(torch.float8_e5m2)
    assert counts._native(float8, Pattern(2, 4), Axis(1), (torch.float32,)) is None


# --- the kept share of squares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_retained_share_is_that_of_the_mask(isa: str, pattern: Pattern) -> None:
    for seed, (shape, axis) in enumerate(PLACES):
        if axis.dim < 0:
            continue
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for dtype in FLOATS:
            for each in laid_out(weight.to(dtype)):
                mask = magnitude_mask(each.abs(), pattern, axis)
                squares = each.double().square()
                expected = float(apply_mask(squares, mask).sum() / squares.sum())
                assert counts.retained_share(each, pattern, axis) == pytest.approx(expected, rel=1e-12)
                assert masks.retained_share(each, mask) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_retained_share_of_special_numbers(isa: str, dtype: torch.dtype) -> None:
    def share(numbers: list[float]) -> float:
        return counts.retained_share(torch.tensor([numbers], dtype=dtype), Pattern(1, 4), Axis(1))

    assert share([0.0, -0.0, 0.0, 0.0]) == 1.0
    assert math.isnan(share([math.nan, 1.0, 0.0, 0.0]))
    assert math.isnan(share([math.inf, 1.0, 0.0, 0.0]))
    top, low = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    assert share([top, top, -top, top]) == pytest.approx(0.25)  # whose squares fit no float of the dtype
    assert share([low, low, -low, low]) == pytest.approx(0.25)


def test_a_large_weight_has_one_share_on_any_number_of_threads(isa: str) -> None:
    weight = torch.randn(700, 1000)
    alone = counts.retained_share(weight, Pattern(2, 4), Axis(1))
    mask = magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1))
    assert alone == pytest.approx(masks.retained_share(weight, mask), rel=1e-12)
    torch.set_num_threads(2)
    try:
        assert counts.retained_share(weight, Pattern(2, 4), Axis(1)) == alone
    finally:
        torch.set_num_threads(1)
