"""Sentence pairs from two text files whose lines belong together: train.en and train.de, plain or .gz."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, cast

Pair = tuple[str, str]

_REPAIR = "repair it, or remove the line from both files, or add --skip_bad to leave such pairs out"


def find_files(folder: Path, name: str, languages: Sequence[str]) -> tuple[Path, Path]:
    """FOLDER/NAME.en and FOLDER/NAME.de, or those with .gz."""
    source, target = (_find(folder, f"{name}.{language}") for language in languages)
    return source, target


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    held = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"{folder} lacks {name} (or {name}.gz); it holds {', '.join(held[:8]) or 'nothing'}. "
        "--languages and --validation say which names are looked for"
    )


def read_pairs(source: Path, target: Path, skip_bad: bool = False) -> Iterator[Pair | None]:
    """The pairs in the order of the lines, without the white space around them; None where `skip_bad` left one out.

    A pair is bad where a line is empty or not UTF-8, or where the other file has no line for it. Lines end with a
    line feed and with nothing else: corpora hold other separators of Unicode inside their sentences.
    """
    files, counts = (source, target), [0, 0]
    for number, lines in enumerate(zip_longest(*map(_lines, files)), start=1):
        counts = [count + (line is not None) for count, line in zip(counts, lines, strict=True)]
        if None in lines:
            if not skip_bad:
                rest = _rest(files[lines[0] is None], number)
                raise ValueError(_unequal(files, counts, rest))
            yield None
            continue
        try:
            yield _text(source, number, lines[0]), _text(target, number, lines[1])
        except ValueError:
            if not skip_bad:
                raise
            yield None


def _rest(longer: Path, number: int) -> int:
    """How many lines the longer file has from this one on."""
    return sum(1 for _ in _lines(longer)) - number + 1


def _unequal(files: tuple[Path, Path], counts: Sequence[int], rest: int) -> str:
    short, long = sorted(zip(counts, files, strict=True))
    return (
        f"{short[1]} ends after line {short[0]}, but {long[1]} goes on to line {short[0] + rest}: a line is missing "
        "somewhere, so that pairs may be wrong from there on. Take files that belong together, "
        "or add --skip_bad to leave out the surplus"
    )


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, plain or compressed, as bytes."""
    number = 0
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, start=1):  # noqa: B007 - told in the error
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read after line {number} ({error}); fetch the file again") from error


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _text(path: Path, number: int, line: bytes | None) -> str:
    assert line is not None
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not UTF-8 (byte {line[error.start]:#x} at its position {error.start + 1}); "
            f"{_REPAIR}"
        ) from error
    if not text:
        raise ValueError(f"{path}, line {number} is empty; {_REPAIR}")
    return text
