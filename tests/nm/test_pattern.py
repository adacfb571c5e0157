"""`Pattern`: N of M, parsed once, and every wrong one refused with its form."""

from __future__ import annotations

import dataclasses
import math

import pytest

from openwork.nm.pattern import Pattern

FORM = "'N:M', N weights kept of every M, with 1 <= N <= M <= 64"
ALL = [Pattern(n, m) for m in range(1, 65) for n in range(1, m + 1)]


@pytest.mark.parametrize(
    ("text", "n", "m"),
    [("2:4", 2, 4), ("1:16", 1, 16), ("4:4", 4, 4), ("1:1", 1, 1), ("64:64", 64, 64), (" 2:4\n", 2, 4)],
)
def test_text_names_a_pattern(text: str, n: int, m: int) -> None:
    found = Pattern.parse(text)
    assert (found.n, found.m) == (n, m)


def test_every_pattern_reads_back_what_it_prints() -> None:
    assert len(ALL) == 64 * 65 // 2
    assert [Pattern.parse(str(pattern)) for pattern in ALL] == ALL


def test_a_pattern_passes_through_parse() -> None:
    pattern = Pattern(2, 4)
    assert Pattern.parse(pattern) is pattern


# ٢:٤ are digits too, but not ours.
GARBAGE = "2x4 4:2 0:4 2:4:8 2 : 2: :4 0:0 -1:4 +1:4 2.0:4 2:4,1:4 1:65 1:100 65:65 2:4x two:four ٢:٤ 2/4 1_0:20"


@pytest.mark.parametrize("garbage", ["", " ", "2 : 4", "2:\n4", *GARBAGE.split()])
def test_garbage_is_refused_with_the_form(garbage: str) -> None:
    with pytest.raises(ValueError, match=FORM):
        Pattern.parse(garbage)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 65), (65, 65), (0, 0), (1, 0)])
def test_numbers_out_of_range_are_refused_with_the_form(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=FORM) as error:
        Pattern(n, m)
    assert f"Pattern({n}, {m})" in str(error.value)


@pytest.mark.parametrize(("n", "m"), [(2.0, 4), (2, 4.0), ("2", "4"), (True, 4), (None, 4)])
def test_numbers_that_are_not_integers_are_refused(n: object, m: object) -> None:
    with pytest.raises(TypeError, match=FORM):
        Pattern(n, m)  # type: ignore[arg-type]


@pytest.mark.parametrize("thing", [None, 24, 2.4, (2, 4), b"2:4"])
def test_what_is_not_text_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match=FORM):
        Pattern.parse(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ALL[::37], ids=str)
def test_density_is_the_share_kept(pattern: Pattern) -> None:
    assert pattern.density * pattern.m == pytest.approx(pattern.n)


@pytest.mark.parametrize("pattern", ALL[::37], ids=str)
def test_index_bits_is_the_shorter_of_indices_and_bitmask(pattern: Pattern) -> None:
    assert pattern.index_bits == min(pattern.n * math.ceil(math.log2(pattern.m)), pattern.m)


def test_dense_is_allowed() -> None:
    assert Pattern(4, 4).density == 1.0


def test_patterns_are_values() -> None:
    assert {Pattern(2, 4): "a"}[Pattern.parse("2:4")] == "a"
    assert Pattern(2, 4) != Pattern(2, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pattern(2, 4).n = 3  # type: ignore[misc]
