"""Numbers, dates and times spelled out, in English and in German: translations that are exact by construction.

Whether a pair is for training or for validation follows from its text, so that no sentence is in both.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from itertools import count, islice
from zlib import crc32

import numpy as np

from openwork.recipes.draws import uniform

Pair = tuple[str, str]
Draws = np.ndarray  # numbers in [0, 1)

_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_EN_TENS = "- ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_EN_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_EN_MONTHS = "January February March April May June July August September October November December".split()
_EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

_DE = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
_DE_TENS = "- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_DE_ORDINALS = {1: "erste", 3: "dritte", 7: "siebte", 8: "achte"}
_DE_MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
_DE_DAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split()

_UNITS = (("kilometre", "Kilometer"), ("litre", "Liter"), ("metre", "Meter"), ("euro", "Euro"), ("dollar", "Dollar"))


def english(number: int) -> str:
    """A number below a million, as in Britain.

    >>> english(21_305)
    'twenty-one thousand three hundred and five'
    """
    if number < 20:
        return _EN[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _EN_TENS[tens] + (f"-{_EN[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_EN[hundreds]} hundred" + (f" and {english(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if rest < 100 else " "
    return f"{english(thousands)} thousand" + (f"{joint}{english(rest)}" if rest else "")


def german(number: int, last: str = "eins") -> str:
    """A number below a million, one word; `last` is its form of a one at the end.

    >>> german(21_305), german(201)
    ('einundzwanzigtausenddreihundertfünf', 'zweihunderteins')
    """
    if number < 20:
        return last if number == 1 else _DE[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{_DE[ones]}und" if ones else "") + _DE_TENS[tens]
    size, name = (100, "hundert") if number < 1000 else (1000, "tausend")
    many, rest = divmod(number, size)
    return german(many, "ein") + name + (german(rest, last) if rest else "")


def english_ordinal(number: int) -> str:
    """
    >>> english_ordinal(31), english_ordinal(20)
    ('thirty-first', 'twentieth')
    """
    before, dash, last = english(number).rpartition("-")
    last = _EN_ORDINALS.get(last) or (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return before + dash + last


def german_ordinal(number: int) -> str:
    """Below a hundred.

    >>> german_ordinal(7), german_ordinal(31)
    ('siebte', 'einunddreißigste')
    """
    return _DE_ORDINALS.get(number) or german(number) + ("te" if number < 20 else "ste")


def english_year(year: int) -> str:
    """
    >>> english_year(1907), english_year(1984), english_year(2004)
    ('nineteen oh seven', 'nineteen eighty-four', 'two thousand and four')
    """
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return english(year)
    return english(century) + (f" {'oh ' * (rest < 10)}{english(rest)}" if rest else " hundred")


def german_year(year: int) -> str:
    """
    >>> german_year(1984), german_year(2004)
    ('neunzehnhundertvierundachtzig', 'zweitausendvier')
    """
    if year >= 2000:
        return german(year)
    century, rest = divmod(year, 100)
    return f"{german(century)}hundert" + (german(rest) if rest else "")


def _number(draws: Draws) -> Pair:
    number = int(10 ** (6 * draws[0]))  # as many short ones as long ones
    return english(number), german(number)


def _amount(draws: Draws) -> Pair:
    number = int(10 ** (4 * draws[0]))
    unit, einheit = _UNITS[int(draws[1] * len(_UNITS))]
    return f"{english(number)} {unit}{'s' * (number > 1)}", f"{german(number, 'ein')} {einheit}"


def _date(draws: Draws) -> Pair:
    """A day between 1100 and 2100, with its weekday and year or without."""
    first, last = datetime.date(1100, 1, 1).toordinal(), datetime.date(2100, 1, 1).toordinal()
    day = datetime.date.fromordinal(first + int(draws[0] * (last - first)))
    english = f"the {english_ordinal(day.day)} of {_EN_MONTHS[day.month - 1]}"
    german = f"{german_ordinal(day.day)}n {_DE_MONTHS[day.month - 1]}"
    if draws[1] < 0.5:
        english, german = f"{_EN_DAYS[day.weekday()]}, {english}", f"{_DE_DAYS[day.weekday()]}, dem {german}"
    if draws[2] < 0.7:
        english, german = f"{english}, {english_year(day.year)}", f"{german} {german_year(day.year)}"
    return f"on {english}", f"am {german}"


def _span(draws: Draws) -> Pair:
    start, end = sorted(1 + int(draw * 28) for draw in draws[:2])
    month = int(draws[2] * 12)
    return (
        f"from the {english_ordinal(start)} to the {english_ordinal(end + 1)} of {_EN_MONTHS[month]}",
        f"vom {german_ordinal(start)}n bis zum {german_ordinal(end + 1)}n {_DE_MONTHS[month]}",
    )


def _time(draws: Draws) -> Pair:
    """Half and a quarter as people say them: half past six is the half of the seventh hour in German."""
    hour, minutes = 1 + int(draws[0] * 12), 5 * int(draws[1] * 12)
    following = hour % 12 + 1
    if minutes == 0:
        return f"at {english(hour)} o'clock", f"um {german(hour, 'ein')} Uhr"
    if minutes == 30:
        return f"at half past {english(hour)}", f"um halb {german(following)}"
    past, near = minutes < 30, min(minutes, 60 - minutes)
    named = hour if past else following
    many, viele = ("a quarter", "Viertel") if near == 15 else (english(near), german(near))
    return (
        f"at {many} {'past' if past else 'to'} {english(named)}",
        f"um {viele} {'nach' if past else 'vor'} {german(named)}",
    )


def _appointment(draws: Draws) -> Pair:
    (date, datum), (time, zeit) = _date(draws[:3]), _time(draws[3:])
    return f"{date}, {time}", f"{datum} {zeit}"


_KINDS: tuple[Callable[[Draws], Pair], ...] = (_number, _amount, _date, _span, _appointment)


def sentences(start: int, end: int) -> list[Pair]:
    """Those of an endless list from `start` to before `end`.

    >>> sentences(8, 9)
    [('eighty-eight', 'achtundachtzig')]
    """
    draws = uniform(0, 0, np.arange(start, end), 6)
    return [_KINDS[int(each[0] * len(_KINDS))](each[1:]) for each in draws]


def for_validation(sentence: str) -> bool:
    """One in ten, decided by the text itself."""
    return crc32(sentence.encode()) % 10 == 0


def pairs(number: int, validation: bool) -> list[Pair]:
    """The first sentences of the list that are for this part."""
    blocks = (sentences(start, start + 1000) for start in count(step=1000))
    mine = (pair for block in blocks for pair in block if for_validation(pair[0]) == validation)
    return list(islice(mine, number))
