"""Text for a language model: files, a tokenizer for them, and windows of their tokens.

A text is one row of tokens. Training windows lie side by side in it, in each epoch moved by another number of tokens;
of the validation text every token but the first is predicted once.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from openwork.recipes.data import Data, spaced
from openwork.recipes.data_files import DataFolder
from openwork.recipes.draws import uniform
from openwork.utils.counted import counted

Batch = dict[str, Tensor]

IGNORED = -100  # the label of padding
_TENTH = 10  # where no validation text is given, this part of each file is
_BLOCK = 1 << 16  # characters that are cut into tokens at a time


def text_files(place: str, follow_links: bool = False) -> list[Path]:
    """The *.txt files of a folder, a file, or the files that a pattern with * names; in the order of their names."""
    folder = Path(place)
    found = folder.glob("*.txt") if folder.is_dir() else map(Path, glob.glob(place, recursive=True))
    files = sorted(path for path in found if path.is_file())
    if not files:
        wanted = "a folder with *.txt, a file, or a pattern such as 'DIR/*.txt'"
        raise FileNotFoundError(f"{place} has no text: there is no file of that name; needed {wanted}")
    for path in files:
        DataFolder(path.parent, follow_links).check(path)
    return files


def read_texts(files: Sequence[Path], encoding: str, skip_bad: bool = False) -> tuple[list[str], int]:
    """Their texts, as they are, and how many of them `skip_bad` left out."""
    texts = []
    for path in files:
        try:
            texts.append(path.read_bytes().decode(encoding))
        except UnicodeDecodeError as error:  # noqa: PERF203
            if skip_bad:
                continue
            raise ValueError(
                f"{path} is not {encoding}: {error.reason} at byte {error.start}; repair it, say what it is "
                "(--encoding latin-1), or add --skip_bad to leave such files out"
            ) from error
    return texts, len(files) - len(texts)


def held_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of each text all but its last tenth, and that tenth, from the beginning of a line where that is near.

    >>> held_out(["0123456\\n8\\n"])
    (['0123456\\n'], ['8\\n'])
    """
    parts = [(text[:cut], text[cut:]) for text, cut in zip(texts, map(_cut, texts), strict=True)]
    return [train for train, _ in parts], [val for _, val in parts]


def _cut(text: str) -> int:
    cut = len(text) - len(text) // _TENTH
    line_ends = text.find("\n", cut - 1, cut + len(text) // (5 * _TENTH)) + 1
    return line_ends or cut


def blocks(text: str) -> Iterator[str]:
    """A text in pieces that end with their lines, where no white space is beside the line feed, so that the tokens are
    those of the whole: tokenizers cut many short texts on all cores, a long one on one.

    >>> [*blocks("one\\n\\ntwo")]
    ['one\\n\\ntwo']
    """
    start = 0
    for line in re.finditer(r"(?<=\S)\n(?=\S)", text):
        if line.end() - start >= _BLOCK:
            yield text[start : line.end()]
            start = line.end()
    yield text[start:]


def tokens_of(tokenizer: Any, texts: Sequence[str], separator: int | None) -> np.ndarray:
    """The tokens of all texts in one row, int32 (T,), `separator` between two of them if there is one."""
    row: list[np.ndarray] = []
    for number, text in enumerate(texts):
        if number and separator is not None:
            row.append(np.array([separator], np.int32))
        pieces = tokenizer.encode_batch(list(blocks(text)), add_special_tokens=False)
        row += [np.array(piece.ids, np.int32) for piece in pieces]
    return np.concatenate(row) if row else np.zeros(0, np.int32)


@dataclass(frozen=True)
class Windows(Dataset[np.ndarray]):
    """Windows of `length` tokens, with the one that follows. Those of training are moved in each epoch, all alike."""

    tokens: np.ndarray
    starts: Sequence[int]
    length: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, key: Any) -> np.ndarray:
        start = self.starts[key] if isinstance(key, int) else self._moved(*key)
        return self.tokens[start : start + self.length + 1]

    def _moved(self, seed: int, epoch: int, index: int) -> int:
        by = int(self.length * uniform(seed, epoch, np.array([0]), 1)[0, 0])
        return min(self.starts[index] + by, len(self.tokens) - 1 - self.length)


def collate(windows: Sequence[np.ndarray]) -> Batch:
    """`input_ids`, and as `labels` what follows each; IGNORED where a shorter window has nothing."""
    rows = [torch.from_numpy(window).long() for window in windows]
    return {
        "input_ids": pad_sequence([row[:-1] for row in rows], batch_first=True),
        "labels": pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED),
    }


@dataclass(frozen=True)
class LanguageInfo:
    """The tokenizer, the length of a window, bytes of a validation token in the mean, and notes for the report."""

    tokenizer: Any
    length: int
    bytes_per_token: float
    notes: dict[str, str]


def load_windows(
    tokenizer: Any,
    train: Sequence[str],
    val: Sequence[str],
    *,
    length: int,
    separator: int | None = None,
    limits: tuple[int, int] = (0, 0),
    skipped: int = 0,
) -> Data:
    """Texts as windows; of both parts so many, evenly spaced, as `limits` say."""
    rows = [tokens_of(tokenizer, texts, separator) for texts in (train, val)]
    if len(rows[0]) <= length or len(rows[1]) < 2:
        raise ValueError(
            f"the training text has {counted(len(rows[0]), 'token')}, the validation text {len(rows[1])}; needed are "
            f"at least {length + 1}, a window and one more, and 2: give more text, or a smaller --length"
        )
    count = (len(rows[0]) - 1) // length
    starts = range(0, count * length, length), range(0, len(rows[1]) - 1, length)
    training, validation = (Windows(row, spaced(starts[i], limits[i]), length) for i, row in enumerate(rows))
    size = sum(len(text.encode()) for text in val)
    notes = {
        "vocabulary": f"{tokenizer.get_vocab_size()} tokens",
        "training text": f"{counted(len(rows[0]), 'token')}, {counted(len(training), 'window')} of {length} an epoch",
        "validation text": f"{len(rows[1])} tokens of {size} bytes, in {counted(len(validation), 'window')}",
        "perplexity without context": f"{unigram_perplexity(*rows):.1f}: of tokens as often as in the training text",
    }
    info = LanguageInfo(tokenizer, length, size / len(rows[1]), notes)
    return Data(training, validation, collate, skipped=skipped, info=info)


def unigram_perplexity(train: np.ndarray, val: np.ndarray) -> float:
    """Of the model that gives each token its share in the training text, one more of each counted.

    >>> round(unigram_perplexity(np.array([0, 0, 0, 1]), np.array([0, 1])), 3)
    2.121
    """
    counts = 1 + np.bincount(train, minlength=max(train.max(), val.max()) + 1)
    return float(np.exp(-np.log(counts / counts.sum())[val].mean()))
