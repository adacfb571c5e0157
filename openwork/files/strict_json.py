"""JSON of files that may be forged: what Python's own reader lets pass is refused, and what would unfold to much more
memory than it takes on the disk."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openwork.utils.atomic import open_plain

_MOST_DIMS = 64  # numpy's limit; torch has none, and becomes slow
_MOST_VALUES = 250_000  # of which each takes up to some 250 bytes of memory
_LONGEST_FILE = 100_000_000  # bytes
_SPACE = re.compile(r"[ \t\n\r]*")


def strict_json(text: str, most: int = _MOST_VALUES) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name given twice, NaN, infinity, depth, what is not an object, and for
    more than `most` values, which are counted before memory is asked for them."""
    values = text.count(",") + text.count("[") + text.count("{")
    if values > most:
        raise ValueError(f"JSON of about {values} values; the limit is {most}")
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("JSON is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"found a JSON {type(value).__name__}; needed an object")
    return value


def read_json(path: str | os.PathLike[str], most: int = 10 * _MOST_VALUES) -> dict[str, Any]:
    """`strict_json` of a file; errors name it."""
    try:
        with open_plain(path) as file:
            text = file.read(_LONGEST_FILE + 1)
        if len(text) > _LONGEST_FILE:
            raise ValueError(f"more than {_LONGEST_FILE} bytes of JSON: no such file of a model is that long")
        return strict_json(text.decode("utf-8"), most)
    except ValueError as error:
        raise ValueError(f"{Path(path)}: {error}") from error


class Cursor:
    """Reads JSON one value after the other, so that none is in memory before it is asked for."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def members(self) -> Iterator[str]:
        """The names of the object that comes next. After each of them its value is to be read, by one of the others.
        Raises TypeError where something else comes."""
        if self._next() != "{":
            raise TypeError("found no JSON object where one is needed")
        self._at += 1
        if self._next() == "}":
            self._at += 1
            return
        while True:
            name = self.text_value("a name in double quotes")
            self._expect(":")
            yield name
            if self._expect(",}") == "}":
                return

    def text_value(self, what: str = "text") -> str:
        """The text that comes next. Raises TypeError where it is something else."""
        if self._next() != '"':
            if what == "text":
                raise TypeError("found no text where it is needed")
            raise ValueError(f"Expecting {what} at character {self._at} of the JSON")
        value, self._at = _DECODER.raw_decode(self._text, self._at)
        return str(value)

    def value(self, longest: int) -> Any:
        """The value that comes next. Raises OverflowError where it is longer than a number of characters."""
        self._next()
        piece = self._text[self._at : self._at + longest]
        try:
            value, length = _DECODER.raw_decode(piece)
        except RecursionError:
            raise ValueError("JSON is nested too deep") from None
        except json.JSONDecodeError as error:
            if len(piece) == longest:
                raise OverflowError from None
            raise ValueError(f"{error.msg} at character {self._at + error.pos} of the JSON") from None
        self._at += length
        return value

    def end(self) -> None:
        """Raise ValueError where anything but space follows."""
        if self._next():
            raise ValueError(f"Expecting the end at character {self._at} of the JSON")

    def _next(self) -> str:
        """The next character that is no space; nothing at the end."""
        spaces = _SPACE.match(self._text, self._at)
        self._at = spaces.end() if spaces else self._at
        return self._text[self._at : self._at + 1]

    def _expect(self, letters: str) -> str:
        found = self._next()
        if not found or found not in letters:
            raise ValueError(f"Expecting {' or '.join(letters)} at character {self._at} of the JSON")
        self._at += 1
        return found


def is_text_mapping(value: object) -> bool:
    """Whether a piece of JSON maps text to text."""
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def is_shape(value: object) -> bool:
    """Whether a piece of JSON is the shape of a tensor that torch can count."""
    if not isinstance(value, list) or len(value) > _MOST_DIMS or any(type(length) is not int for length in value):
        return False
    return all(length >= 0 for length in value) and 8 * math.prod(length for length in value if length) < 2**63


def check_unicode(name: str) -> str:
    """The name, if UTF-8 can write it; else ValueError. (JSON can name halves of surrogate pairs.)"""
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"the name {name!r} is not valid Unicode")
    return name


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} is given twice")
    return mapping


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_refuse)
