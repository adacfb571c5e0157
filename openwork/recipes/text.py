"""Sentence pairs: read from text files, cut into subwords, put into batches.

Subwords of both languages are one vocabulary, byte pair encoding (Sennrich et al., arXiv:1508.07909) of bytes by
`tokenizers`: no character is unknown, every text comes back as it was, the same text gives the same vocabulary.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from openwork.recipes.data import Data
from openwork.recipes.data_files import DataFolder
from openwork.utils.counted import counted

Pair = tuple[str, str]
Batch = dict[str, Tensor]
Ids = list[np.ndarray]  # int32, the subwords of each sentence

PAD, END = 0, 1  # numbers of the two symbols that are no text; translations start with PAD, as Marian's do
_BLOCK = 10_000  # lines encoded at a time
_LONGEST = 1 << 20  # bytes of a line: a compressed file can hold one that no memory does
_REPAIR = "repair it, or remove the line from both files, or add --skip_bad to leave such pairs out"


def find_file(folder: Path, name: str, follow_links: bool = False) -> Path:
    """FOLDER/NAME or FOLDER/NAME.gz."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            DataFolder(folder, follow_links).check(path)
            return path
    present = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"{folder} lacks {name} (or {name}.gz); it holds {', '.join(present[:8]) or 'nothing'}. "
        "--languages and --validation say which names are looked for"
    )


def read_pairs(source: Path, target: Path, skip_bad: bool = False) -> Iterator[Pair | None]:
    """The pairs in the order of the lines, without the white space around them; None where `skip_bad` left one out.

    A pair is bad where a line is empty or not UTF-8, or where the other file has no line for it. Lines end with a
    line feed and with nothing else: corpora hold other separators of Unicode inside their sentences.
    """
    for number, (first, second) in enumerate(zip_longest(_lines(source), _lines(target)), start=1):
        try:
            yield _text(source, number, first), _text(target, number, second)
        except ValueError:  # noqa: PERF203
            if not skip_bad:
                raise
            yield None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, plain or compressed, as bytes."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            while line := file.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    raise ValueError(
                        f"{path}, line {number} is longer than {_LONGEST} bytes: this is no text of sentences"
                    )
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read after line {number} ({error}); fetch the file again") from error


def _text(path: Path, number: int, line: bytes | None) -> str:
    if line is None:
        raise ValueError(
            f"{path} ends after line {number - 1}, but the other file goes on: a line is missing somewhere, so that "
            "pairs may be wrong from there on. Take files that belong together, or add --skip_bad to leave out the rest"
        )
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        place = f"byte {line[error.start]:#x} at its position {error.start + 1}"
        raise ValueError(f"{path}, line {number} is not UTF-8 ({place}); {_REPAIR}") from error
    if not text:
        raise ValueError(f"{path}, line {number} is empty; {_REPAIR}")
    return text


def learn(
    lines: Iterable[str], size: int, symbols: Sequence[str] = ("<pad>", "</s>"), prefix_space: bool = True
) -> Any:
    """A `tokenizers.Tokenizer` with up to `size` subwords, the 256 bytes and the symbols among them. With
    `prefix_space` a text's first word is the same as its others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(symbols),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def stored_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{path} holds no vocabulary of tokenizers ({error}); remove it to have it made anew"
        ) from error


def check_same_words(tokenizer: Any, teacher: Path, its: Any) -> None:
    """ValueError where the numbers that a teacher predicts stand for other words."""
    ours, theirs = tokenizer.get_vocab(), its.get_vocab()
    if ours != theirs:
        raise ValueError(
            f"--teacher {teacher} has another vocabulary: {len(theirs)} subwords, {len(ours.keys() & theirs.keys())} "
            f"of them among the {len(ours)} of this run. Its words cannot be compared; train both with one vocabulary "
            "(a new --out takes that of its teacher, if --model and --init bring none)"
        )


def encode(tokenizer: Any, lines: Iterable[str]) -> Ids:
    """The subwords of each line of a text of any length, with END."""
    rest, ids = iter(lines), Ids()
    while block := list(islice(rest, _BLOCK)):
        encodings = tokenizer.encode_batch(block, add_special_tokens=False)
        ids += [np.array([*encoding.ids, END], np.int32) for encoding in encodings]
    return ids


def decode(tokenizer: Any, numbers: Sequence[Sequence[int]]) -> list[str]:
    """The texts of sequences, each up to its first END."""
    cut = [list(ids)[: list(ids).index(END) if END in ids else None] for ids in numbers]
    return [text.strip() for text in tokenizer.decode_batch(cut, skip_special_tokens=True)]


@dataclass(frozen=True)
class SentencePairs(Dataset[Any]):
    sources: Ids
    targets: Ids

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: Any) -> tuple[np.ndarray, np.ndarray]:
        index = key if isinstance(key, int) else key[2]
        return self.sources[index], self.targets[index]


def collate(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """What MarianMT takes, and `labels`: the target shifted by one, PAD where there is none."""
    source, labels = (
        pad_sequence([torch.from_numpy(ids).long() for ids in side], batch_first=True, padding_value=PAD)
        for side in zip(*samples, strict=True)
    )
    started = torch.cat([torch.full_like(labels[:, :1], PAD), labels[:, :-1]], dim=1)
    mask = (source != PAD).long()
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": started, "labels": labels}


@dataclass(frozen=True)
class TextInfo:
    """The vocabulary, the validation pairs as text, and what the report says of the data."""

    tokenizer: Any
    val_pairs: Sequence[Pair]
    notes: dict[str, str]


Reader = Callable[[], Iterable[Pair | None]]  # may be called again: a full-size text is not held in memory


def load_text(
    read_train: Reader, read_val: Reader, vocabulary: int, max_length: int, known: Sequence[Path] = ()
) -> Data:
    """Sentence pairs as numbers. The vocabulary is the first of the files `known` that exists, else learned from the
    training text. Training pairs of more than `max_length` subwords are left out, longer validation sentences are cut:
    the notes tell how many. Validation pairs come the shortest first.
    """
    path = next((path for path in known if path.exists()), None)
    texts = (text for pair in read_train() if pair for text in pair)
    tokenizer = stored_tokenizer(path) if path else learn(texts, vocabulary)
    sources, targets = (encode(tokenizer, (pair[i] for pair in read_train() if pair)) for i in (0, 1))
    lengths = np.array([(len(source), len(target)) for source, target in zip(sources, targets, strict=True)])
    (short,) = (lengths.reshape(-1, 2).max(1) <= max_length).nonzero()
    read = list(read_val())
    val_pairs = [pair for pair in read if pair]
    if not (len(short) and val_pairs):
        raise ValueError(
            f"of training pairs of up to {counted(max_length, 'subword')} there are {len(short)}, of validation "
            f"pairs {len(val_pairs)}; needed is one of each at least"
        )
    val = [encode(tokenizer, (pair[i] for pair in val_pairs)) for i in (0, 1)]
    order = np.argsort([len(source) for source in val[0]], kind="stable")
    cut = [[_cut(side[i], max_length) for i in order] for side in val]
    bad_train = sum(1 for pair in read_train() if not pair)
    long = len(sources) - len(short)
    long_val = sum(max(map(len, pair)) > max_length for pair in zip(*val, strict=True))
    notes = {
        "vocabulary": f"{tokenizer.get_vocab_size()} subwords of both languages",
        "training pairs": f"{len(short)}" + f", without {long} of more than {max_length} subwords" * bool(long),
        "validation pairs": f"{len(val_pairs)}" + f", {long_val} of them cut to {max_length} subwords" * bool(long_val),
    }
    return Data(
        SentencePairs([sources[i] for i in short], [targets[i] for i in short]),
        SentencePairs(*cut),
        collate,
        skipped=bad_train + len(read) - len(val_pairs),
        sizes=lengths[short].sum(1),
        info=TextInfo(tokenizer, [val_pairs[i] for i in order], notes),
    )


def _cut(ids: np.ndarray, max_length: int) -> np.ndarray:
    """END stays the last of a sentence that is cut."""
    return ids if len(ids) <= max_length else np.append(ids[: max_length - 1], np.int32(END))
