"""Counts in sentences."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number with its noun, or with more of the sentence; `plural` where it is not the singular and an s.

    >>> counted(1, "weight"), counted(0, "weight"), counted(2, "weight is dense", "weights are dense")
    ('1 weight', '0 weights', '2 weights are dense')
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
