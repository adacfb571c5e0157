"""The generated translations: exact, in order, and none in both parts."""

import pytest

from openwork.recipes.number_words import english, pairs


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (40, "forty"),
        (300, "three hundred"),
        (1_001, "one thousand and one"),
        (99_999, "ninety-nine thousand nine hundred and ninety-nine"),
        (700_200, "seven hundred thousand two hundred"),
    ],
)
def test_numbers_in_words(number, words):
    assert english(number) == words


def test_the_parts_are_apart_and_the_same_each_time():
    train, val = pairs(2000, False), pairs(200, True)
    assert (train, val) == (pairs(2000, False), pairs(200, True))
    assert pairs(10, False) == train[:10]
    assert {source for source, _ in train}.isdisjoint(source for source, _ in val)
    for source, target in (*train, *val):
        assert english(int(target.replace(" ", ""))) == source
