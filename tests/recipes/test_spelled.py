"""The generated sentences, against words that everyone can look up."""

from datetime import date

import pytest

from openwork.recipes import spelled
from openwork.recipes.spelled import english, english_ordinal, english_year, german, german_ordinal, german_year

NUMBERS = {
    0: ("zero", "null"),
    1: ("one", "eins"),
    12: ("twelve", "zwölf"),
    16: ("sixteen", "sechzehn"),
    17: ("seventeen", "siebzehn"),
    21: ("twenty-one", "einundzwanzig"),
    30: ("thirty", "dreißig"),
    66: ("sixty-six", "sechsundsechzig"),
    77: ("seventy-seven", "siebenundsiebzig"),
    100: ("one hundred", "einhundert"),
    101: ("one hundred and one", "einhunderteins"),
    342: ("three hundred and forty-two", "dreihundertzweiundvierzig"),
    1000: ("one thousand", "eintausend"),
    1001: ("one thousand and one", "eintausendeins"),
    1100: ("one thousand one hundred", "eintausendeinhundert"),
    21_000: ("twenty-one thousand", "einundzwanzigtausend"),
    101_000: ("one hundred and one thousand", "einhunderteintausend"),
    999_999: (
        "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
        "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
    ),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(number):
    assert (english(number), german(number)) == NUMBERS[number]


@pytest.mark.parametrize(
    ("number", "words", "worte"),
    [
        (1, "first", "erste"),
        (2, "second", "zweite"),
        (3, "third", "dritte"),
        (4, "fourth", "vierte"),
        (5, "fifth", "fünfte"),
        (7, "seventh", "siebte"),
        (8, "eighth", "achte"),
        (9, "ninth", "neunte"),
        (12, "twelfth", "zwölfte"),
        (19, "nineteenth", "neunzehnte"),
        (20, "twentieth", "zwanzigste"),
        (23, "twenty-third", "dreiundzwanzigste"),
        (31, "thirty-first", "einunddreißigste"),
    ],
)
def test_ordinals(number, words, worte):
    assert (english_ordinal(number), german_ordinal(number)) == (words, worte)


@pytest.mark.parametrize(
    ("year", "words", "worte"),
    [
        (1100, "eleven hundred", "elfhundert"),
        (1648, "sixteen forty-eight", "sechzehnhundertachtundvierzig"),
        (1900, "nineteen hundred", "neunzehnhundert"),
        (1901, "nineteen oh one", "neunzehnhunderteins"),
        (2000, "two thousand", "zweitausend"),
        (2009, "two thousand and nine", "zweitausendneun"),
        (2026, "twenty twenty-six", "zweitausendsechsundzwanzig"),
    ],
)
def test_years(year, words, worte):
    assert (english_year(year), german_year(year)) == (words, worte)


@pytest.mark.parametrize(
    ("draws", "words", "worte"),
    [
        ((5.5 / 12, 6.5 / 12), "at half past six", "um halb sieben"),
        ((11.5 / 12, 6.5 / 12), "at half past twelve", "um halb eins"),
        ((0, 0), "at one o'clock", "um ein Uhr"),
        ((0, 3.5 / 12), "at a quarter past one", "um Viertel nach eins"),
        ((11.5 / 12, 9.5 / 12), "at a quarter to one", "um Viertel vor eins"),
        ((2.5 / 12, 8.5 / 12), "at twenty to four", "um zwanzig vor vier"),
    ],
)
def test_times(draws, words, worte):
    assert spelled._time(draws) == (words, worte)


def test_dates_have_their_weekday():
    """9 November 1989 was a Thursday."""
    first, last, day = (date(*each).toordinal() for each in ((1100, 1, 1), (2100, 1, 1), (1989, 11, 9)))
    draw = (day + 0.5 - first) / (last - first)
    assert spelled._date((draw, 0, 0)) == (
        "on Thursday, the ninth of November, nineteen eighty-nine",
        "am Donnerstag, dem neunten November neunzehnhundertneunundachtzig",
    )
    assert spelled._date((draw, 1, 1)) == ("on the ninth of November", "am neunten November")


def test_a_span_ends_after_it_starts():
    assert spelled._span((0.99, 0.99, 0)) == (
        "from the twenty-eighth to the twenty-ninth of January",
        "vom achtundzwanzigsten bis zum neunundzwanzigsten Januar",
    )


def test_parts_are_disjoint_and_the_same_every_time():
    train, val = spelled.pairs(1000, False), spelled.pairs(100, True)
    assert not {source for source, _ in train} & {source for source, _ in val}
    assert train[:50] == spelled.pairs(50, False)
    assert spelled.sentences(8, 9) == [("eighty-eight", "achtundachtzig")]
    assert len(set(train)) > 900
