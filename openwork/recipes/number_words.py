"""Numbers below a million, in English words and as their digits one by one: translations exact by construction."""

from __future__ import annotations

from itertools import count, islice
from zlib import crc32

import numpy as np

from openwork.recipes.draws import uniform

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"


def english(number: int) -> str:
    """
    >>> english(21_305)
    'twenty-one thousand three hundred and five'
    """
    if number < 20:
        return _SMALL.split()[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS.split()[tens] + (f"-{english(ones)}" if ones else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    many, rest = divmod(number, size)
    joint = " and " if rest < 100 else " "
    return f"{english(many)} {name}" + (f"{joint}{english(rest)}" if rest else "")


def pairs(size: int, validation: bool) -> list[tuple[str, str]]:
    """The first of an endless list, as many long numbers as short ones. Whether a number is for validation, one in ten,
    follows from its text: none is in both parts.

    >>> pairs(1, validation=False)
    [('one hundred and seventy-six thousand two hundred and forty-one', '1 7 6 2 4 1')]
    """
    blocks = (uniform(0, 0, np.arange(start, start + 1000), 1)[:, 0] for start in count(step=1000))
    numbers = (int(10 ** (6 * draw)) for block in blocks for draw in block)
    spelled = ((english(number), " ".join(str(number))) for number in numbers)
    return list(islice((pair for pair in spelled if (crc32(pair[0].encode()) % 10 == 0) == validation), size))
