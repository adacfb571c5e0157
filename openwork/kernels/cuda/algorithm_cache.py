"""Which algorithm of cuSPARSELt was the fastest for a shape: searched once, and kept in a file of the user's cache."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from openwork.layouts.layout import Algorithm
from openwork.utils.atomic import write_text
from openwork.utils.caller import outside


def file_of_user() -> Path | None:
    """Where algorithms are kept: OPENWORK_CACHE, or the user's cache; None where the user has no home."""
    folder = os.environ.get("OPENWORK_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(folder).expanduser() / "openwork" / "algorithms.json"
    except RuntimeError:
        return None


def read(file: Path | None) -> dict[str, dict[str, Algorithm]]:
    """Machine -> shape -> algorithm. A damaged file counts as empty, and a warning says so."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
        return {
            str(machine): {str(key): tuple(each) for key, each in entries.items() if _is_algorithm(each)}
            for machine, entries in found.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"{file} cannot be read ({error}): algorithms are searched again", stacklevel=outside())
        return {}


def _is_algorithm(each: object) -> bool:
    return isinstance(each, list) and [type(number) for number in each] == [int] * 3 and each[0] >= 0


def add(file: Path | None, where: str, key: str, algorithm: Algorithm) -> None:
    """Add one entry; readers see the file before or after, whole. Of two who write at once one is searched again."""
    if file is None:
        return
    found = read(file)
    found.setdefault(where, {})[key] = algorithm
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found, indent=1, sort_keys=True))
    except OSError as error:
        warnings.warn(
            f"{file} cannot be written ({error}): algorithms are searched in each process", stacklevel=outside()
        )
