"""The N:M pattern, a type that is parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = "a pattern is written 'N:M', N weights kept of every M, with 1 <= N <= M <= 64, such as '2:4'"


@dataclass(frozen=True, order=True)
class Pattern:
    """At most `n` non-zero weights in every `m` consecutive ones along the reduction axis.

    `n` counts what is **kept**. `n == m` is dense and allowed.

    >>> Pattern(2, 4).density
    0.5
    >>> Pattern(2, 4).index_bits, Pattern(1, 16).index_bits
    (4, 4)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int:
            raise TypeError(f"Pattern({self.n!r}, {self.m!r}): N and M must be integers; {_FORM}")
        if not 1 <= self.n <= self.m <= 64:
            raise ValueError(f"Pattern({self.n}, {self.m}): {_FORM}")

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """The pattern that `text` names; a `Pattern` passes through.

        >>> Pattern.parse("1:16")
        Pattern(n=1, m=16)
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(f"found {text!r} of type {type(text).__name__} for a pattern; {_FORM}")
        found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text.strip())
        if not found:
            raise ValueError(f"found {text!r} for a pattern; {_FORM}")
        return cls(int(found[1]), int(found[2]))

    @property
    def density(self) -> float:
        """Share of weights kept, in (0, 1]."""
        return self.n / self.m

    @property
    def is_dense(self) -> bool:
        """Whether it keeps every weight: N = M."""
        return self.n == self.m

    @property
    def index_bits(self) -> int:
        """Bits that say which weights of one group are kept: N indices, or a bitmask where smaller."""
        return min(self.n * (self.m - 1).bit_length(), self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def within_2_4(pattern: Pattern) -> bool:
    """Whether weights of this pattern are 2:4 as well.

    >>> [within_2_4(Pattern(*each)) for each in ((2, 4), (1, 4), (1, 2), (2, 8), (4, 8), (1, 3))]
    [True, True, True, True, False, True]
    """
    # Four neighbours lie in one group of a multiple of 4, and in at most two of any other M >= 2.
    return (pattern.n <= 2 and pattern.m % 4 == 0) or (pattern.n == 1 and pattern.m > 1)


def check_pattern(pattern: object) -> None:
    """Raises TypeError for anything but a Pattern."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"found {pattern!r} of type {type(pattern).__name__}; needed an ow.Pattern, such as ow.Pattern(2, 4)"
        )
