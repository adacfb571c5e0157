"""The slots that kernels store of a weight, on every instruction set, against the reference: bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openwork.layouts.gemm import Gemm
from openwork.layouts.layout import Vectors
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.slots import slots_reference

PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "1:2", "4:8", "3:8", "1:16", "3:7", "5:33", "32:64", "1:1")]
INTEGERS = {2: torch.int16, 4: torch.int32}
ops = torch.ops.openwork


def sparse(rows: int, K: int, dtype: torch.dtype, pattern: Pattern) -> Tensor:
    """A weight of the pattern: zeros of either sign, infinities, and what is not a number, among what is kept."""
    generator = torch.Generator().manual_seed(K)
    weight = torch.randn(rows, K, generator=generator) * 50
    keep = magnitude_mask(weight.abs(), pattern, Axis(1))
    for special in (0.0, -0.0, math.inf, -math.inf, math.nan):
        weight = torch.where(torch.rand(rows, K, generator=generator) < 0.06, special, weight)
    weight = weight.nan_to_num(7, 7, 7) if dtype == torch.int16 else weight
    minus = torch.where(torch.rand(rows, K, generator=generator) < 0.1, -0.0, apply_mask(weight, keep))
    return torch.where(keep, apply_mask(weight, keep), minus * 0).to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16])
def test_slots_are_those_of_the_reference(isa: str, pattern: Pattern, dtype: torch.dtype) -> None:
    for K in (1, pattern.m, 3 * pattern.m + 1, 8 * pattern.m, 130):
        weight = sparse(5, K, dtype, pattern)
        for tile, even in ((pattern.m, True), (3 * pattern.m, True), (8 * pattern.m, False)):
            given = (weight, pattern.n, pattern.m, tile, 512, even)
            found, expected = ops.slots.default(*given), slots_reference(*given)
            kind = INTEGERS[weight.itemsize]
            assert torch.equal(found[0].view(kind), expected[0].view(kind)), (K, tile)
            assert torch.equal(found[1], expected[1]), (K, tile)


def test_views_are_taken_as_they_are(isa: str) -> None:
    weight = sparse(6, 32, torch.float32, Pattern(2, 4))
    turned = weight.t().contiguous().t()
    for found, expected in zip(
        ops.slots.default(turned, 2, 4, 8, 4, False), slots_reference(weight, 2, 4, 8, 4, False), strict=True
    ):
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_a_denser_weight_is_refused(isa: str) -> None:
    weight = torch.zeros(3, 8)
    weight[2, 4:7] = 1.0
    with pytest.raises(ValueError, match=r"1 of 6 groups holds more than 2 of 4 \(the worst 3\)"):
        ops.slots.default(weight, 2, 4, 8, 4, False)
    with pytest.raises(ValueError, match="1 of 6 groups"):
        Gemm.pack(weight, None, Pattern(2, 4), Vectors())


def test_threads_share_the_rows(isa: str) -> None:
    weight = sparse(2000, 64, torch.float32, Pattern(2, 4)).nan_to_num(1.0)
    torch.set_num_threads(2)
    try:
        found = ops.slots.default(weight, 2, 4, 24, 512, False)
    finally:
        torch.set_num_threads(1)
    for each, expected in zip(found, slots_reference(weight, 2, 4, 24, 512, False), strict=True):
        assert torch.equal(each, expected)


def test_compilers_see_it() -> None:
    for even, K in ((True, 36), (False, 30)):
        weight = sparse(3, K, torch.float32, Pattern(1, 4)).nan_to_num(1.0)
        torch.library.opcheck(ops.slots.default, (weight, 1, 4, 12, 4, even))
