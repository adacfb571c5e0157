"""Subwords of both languages in one vocabulary: byte pair encoding (Sennrich et al., arXiv:1508.07909) of bytes.

Bytes, so that no character is unknown and every text comes back as it was. The training of `tokenizers` breaks ties by
the symbols' numbers, so the same text gives the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

PAD, END = 0, 1  # numbers of the two symbols that are no text; translations start with PAD, as Marian's do
_BLOCK = 10_000  # pairs encoded at a time


def learn(lines: Iterable[str], size: int) -> Any:
    """A `tokenizers.Tokenizer` with up to `size` subwords, the 256 bytes and two symbols among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def stored(path: Path) -> Any:
    """The tokenizer in a file that `Tokenizer.save` or `write_text(..., tokenizer.to_str())` made."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{path} holds no vocabulary of tokenizers ({error}); remove it to have it made anew"
        ) from error


@dataclass(frozen=True)
class Sequences:
    """Many short sequences of numbers in one array: 4.5 million sentences as Python lists would not fit."""

    flat: np.ndarray  # int32
    lengths: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        end = self._ends[index]
        return self.flat[end - self.lengths[index] : end]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    def those(self, mask: np.ndarray) -> Sequences:
        """The sequences where a boolean mask is true."""
        return Sequences(self.flat[np.repeat(mask, self.lengths)], self.lengths[mask])


def sequences(rows: Iterable[Sequence[int] | np.ndarray]) -> Sequences:
    """
    >>> sequences([[3, 4], [5]])[1].tolist()
    [5]
    """
    parts = [np.asarray(row, np.int32) for row in rows]
    return Sequences(np.concatenate([np.zeros(0, np.int32), *parts]), np.array([len(part) for part in parts], np.int64))


def encode(tokenizer: Any, lines: Sequence[str]) -> Sequences:
    """The subwords of each line, with END."""
    return sequences([*each.ids, END] for each in tokenizer.encode_batch(lines, add_special_tokens=False))


def encode_pairs(tokenizer: Any, pairs: Iterable[tuple[str, str]]) -> tuple[Sequences, Sequences]:
    """Both sides of a text of any length."""
    rest = iter(pairs)
    parts: tuple[list[Sequences], list[Sequences]] = ([], [])
    while block := list(islice(rest, _BLOCK)):
        for side, lines in zip(parts, zip(*block, strict=True), strict=True):
            side.append(encode(tokenizer, lines))
    return _joined(parts[0]), _joined(parts[1])


def _joined(parts: Sequence[Sequences]) -> Sequences:
    none = sequences([])
    flat, lengths = ([getattr(each, name) for each in (none, *parts)] for name in ("flat", "lengths"))
    return Sequences(np.concatenate(flat), np.concatenate(lengths))


def decode(tokenizer: Any, numbers: Sequence[Sequence[int]]) -> list[str]:
    """The texts of sequences, each up to its first END."""
    cut = [_before_end(each) for each in numbers]
    return [text.strip() for text in tokenizer.decode_batch(cut, skip_special_tokens=True)]


def _before_end(numbers: Sequence[int]) -> list[int]:
    """
    >>> _before_end([PAD, 7, 8, END, PAD])
    [7, 8]
    """
    words = list(numbers)
    return [word for word in words[: words.index(END) if END in words else None] if word != PAD]


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Sequences as rows of one array, filled up with PAD: int64 (rows, longest)."""
    table = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
