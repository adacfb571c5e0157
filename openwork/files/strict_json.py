"""JSON of files that may be forged: what Python's own reader lets pass is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

_MOST_DIMS = 64  # numpy's limit; torch has none, and becomes slow


def strict_json(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name given twice, NaN, infinity, depth, and what is not an object."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("JSON is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"found a JSON {type(value).__name__}; needed an object")
    return value


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
    if any("\ud800" <= letter <= "\udfff" for letter in name):
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
