"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table in plain text, line by line.

    >>> aligned(["a", "b"], [["long", "x"]])
    ['a     b', 'long  x']
    """
    widths = [max(len(cells[i]) for cells in (header, *lines)) for i in range(len(header))]
    return ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in (header, *lines)]
