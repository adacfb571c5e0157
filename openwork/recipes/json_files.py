"""JSON that every reader takes, with errors that name the file: what is not finite is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(value: Any, indent: int | None = None) -> str:
    """The text of a value. JSON has no NaN and no infinity: null stands for them.

    >>> to_json({"loss": float("nan"), "lr": 0.1})
    '{"loss": null, "lr": 0.1}'
    """
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None for every float in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path, kind: type[T], advice: str) -> T:
    """What a JSON file holds, a dict or a list; ValueError names the file, what was found, and gives the advice."""
    try:
        return _of_kind(_parsed(path.read_text(encoding="utf-8")), kind)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise ValueError(f"{path} is not what a run writes ({error}); {advice}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none if it is missing. A last line cut by a kill is left out."""
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); restore the file, or train again in another --out") from error
    return [_record(path, number, line) for number, line in enumerate(lines, start=1)]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return _of_kind(_parsed(line), dict)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number} is not what a run writes ({error}); correct the line (null stands for a number "
            "that is not finite) or remove it"
        ) from error


def _of_kind(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _parsed(text: str) -> Any:
    try:
        return finite(json.loads(text, parse_constant=_refuse))  # 1e999 is JSON, and infinite
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON: an older version wrote it for a run that diverged")
