"""SAD and flip_rate on masks written by hand, their expectation by simulation, and one bit a weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.nm.mask_stats import chance_flip_rate, flip_rate, largest_flip_rate, pack, packed_sad, sad
from openwork.nm.masks import topn
from openwork.nm.pattern import Pattern

torch.set_num_threads(1)

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 16), Pattern(7, 9), Pattern(4, 4), Pattern(1, 1)]


def bools(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


@pytest.mark.parametrize(
    ("a", "b", "divergence"),
    [("1100", "1100", 0), ("1100", "1010", 2), ("1100", "0011", 4), ("1111", "0000", 4), ("1000", "0000", 1)],
)
def test_sad_counts_positions_whose_membership_differs(a: str, b: str, divergence: int) -> None:
    assert sad(bools(a), bools(b)) == sad(bools(b), bools(a)) == divergence
    assert packed_sad(pack(bools(a)), pack(bools(b))) == divergence


def test_churn_is_a_share_of_all_weights() -> None:
    assert flip_rate(bools("1100").view(2, 2), bools("1010").view(2, 2)) == 0.5


@pytest.mark.parametrize("measure", [sad, flip_rate])
def test_masks_of_two_shapes_are_refused(measure: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(2, 2\)"):
        measure(torch.ones(4, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool))


def test_packed_masks_are_refused_as_masks() -> None:
    packed = pack(bools("11001010"))
    with pytest.raises(TypeError, match=r"torch\.uint8.*needed torch\.bool"):
        sad(packed, packed)


def test_masks_are_refused_as_packed_masks() -> None:
    with pytest.raises(TypeError, match=r"torch\.bool.*needed torch\.uint8"):
        packed_sad(bools("1100"), bools("1100"))


def test_packed_masks_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 bytes"):
        packed_sad(pack(bools("110011001")), pack(bools("11001100")))


# --- what the flip rate can be -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_chance_churn_is_what_unrelated_masks_have(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (topn(torch.rand(20_000, pattern.m, generator=generator), pattern) for _ in range(2))
    assert flip_rate(a, b) == pytest.approx(chance_flip_rate(pattern), abs=0.01)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_largest_churn_is_reached_by_opposite_scores(pattern: Pattern) -> None:
    score = torch.rand(10, pattern.m, generator=torch.Generator().manual_seed(0))
    assert flip_rate(topn(score, pattern), topn(-score, pattern)) == pytest.approx(largest_flip_rate(pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_chance_is_at_most_the_largest(pattern: Pattern) -> None:
    assert 0 <= chance_flip_rate(pattern) <= largest_flip_rate(pattern) <= 1


# --- one bit a weight --------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=70))
def test_packing_keeps_the_divergence(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor([pair[i] for pair in pairs], dtype=torch.bool) for i in range(2))
    assert packed_sad(pack(a), pack(b)) == sad(a, b)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_packing_is_one_bit_a_weight_low_bit_first(mask: list[bool]) -> None:
    packed = pack(torch.tensor(mask, dtype=torch.bool))
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(mask) + 7) // 8
    assert [bool(packed[i // 8] >> (i % 8) & 1) for i in range(len(mask))] == mask
    assert int.from_bytes(packed.numpy().tobytes(), "little") == sum(kept << i for i, kept in enumerate(mask))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3, 3), (1,), (0,), (0, 4), ()])
def test_packing_follows_logical_order_in_any_layout(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    strided = mask.movedim(0, -1).contiguous().movedim(-1, 0) if shape else mask
    assert torch.equal(pack(strided), pack(mask.flatten()))


def test_packing_leaves_the_mask() -> None:
    mask = bools("110100101")
    pack(mask)
    assert torch.equal(mask, bools("110100101"))


def test_masks_that_begin_anywhere_in_memory() -> None:
    mask = torch.rand(100, generator=torch.Generator().manual_seed(0)) > 0.5
    for first in range(9):
        part, other = mask[first : first + 64], ~mask[first : first + 64]
        packed = torch.cat([torch.zeros(first, dtype=torch.uint8), pack(part)])[first:]
        assert torch.equal(packed, pack(part.clone()))
        assert packed_sad(packed, pack(other)) == 64


def test_every_byte_is_counted() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)[1:]
    assert packed_sad(every, torch.zeros_like(every)) == sum(int(byte).bit_count() for byte in every)
