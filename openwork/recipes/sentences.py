"""Sentence pairs as numbers, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwork.recipes.parallel_text import Pair
from openwork.recipes.subwords import END, PAD, Sequences, encode_pairs, learn, padded, sequences, stored

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sentences:
    """Training pairs as numbers, validation pairs as numbers and text, the shortest first. See `Data` for the rest."""

    tokenizer: Any
    train: tuple[Sequences, Sequences]  # sources, targets
    val: tuple[Sequences, Sequences]
    val_pairs: Sequence[Pair]
    skipped: int = 0
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def train_count(self) -> int:
        return len(self.train[0])

    @property
    def val_count(self) -> int:
        return len(self.val[0])

    @property
    def train_sizes(self) -> np.ndarray:
        """The numbers of a pair, both sides together."""
        return self.train[0].lengths + self.train[1].lengths

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[Batch]:
        return (collate(*self.train, each) for each in batches)

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        return (collate(*self.val, each) for each in batches)


def collate(sources: Sequences, targets: Sequences, indices: np.ndarray) -> Batch:
    """What MarianMT takes, and `labels`: the target shifted by one, PAD where there is none."""
    source = torch.from_numpy(padded([sources[i] for i in indices]))
    labels = torch.from_numpy(padded([targets[i] for i in indices]))
    started = torch.cat([torch.full_like(labels[:, :1], PAD), labels[:, :-1]], dim=1)
    mask = (source != PAD).long()
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": started, "labels": labels}


@dataclass(frozen=True)
class Corpus:
    """Pairs that can be read again and again: a full-size training text is not held in memory."""

    train: Callable[[], Iterable[Pair | None]]
    val: Callable[[], Iterable[Pair | None]]


def load(corpus: Corpus, vocabulary: int, longest: int, known: Sequence[Path] = ()) -> Sentences:
    """A corpus as numbers. The vocabulary is the first of the files `known` that exists, else learned from the training
    text. Training pairs of more than `longest` subwords are left out, longer validation sentences are cut: `notes`
    tells how many.
    """
    found = next((path for path in known if path.exists()), None)
    tokenizer = stored(found) if found else learn(_texts(corpus.train()), vocabulary)
    good = _Good(corpus.train())
    train = encode_pairs(tokenizer, good)
    read = list(corpus.val())
    val_pairs = [pair for pair in read if pair]
    val = encode_pairs(tokenizer, val_pairs)
    short = np.maximum(train[0].lengths, train[1].lengths) <= longest
    if not (short.any() and val_pairs):
        raise ValueError(
            f"there are {short.sum()} training pairs of up to {longest} subwords and {len(val_pairs)} validation "
            "pairs; needed is one of each at least"
        )
    order = np.argsort(val[0].lengths, kind="stable")
    return Sentences(
        tokenizer,
        (train[0].those(short), train[1].those(short)),
        (_cut(val[0], order, longest), _cut(val[1], order, longest)),
        [val_pairs[i] for i in order],
        good.bad + len(read) - len(val_pairs),
        _notes(tokenizer, short, val, longest),
    )


def _texts(pairs: Iterable[Pair | None]) -> Iterator[str]:
    return (text for pair in pairs if pair for text in pair)


class _Good:
    """The pairs that are not None, and after them how many were."""

    def __init__(self, pairs: Iterable[Pair | None]) -> None:
        self.pairs, self.bad = pairs, 0

    def __iter__(self) -> Iterator[Pair]:
        for pair in self.pairs:
            if pair:
                yield pair
            else:
                self.bad += 1


def _cut(rows: Sequences, order: np.ndarray, longest: int) -> Sequences:
    """The sequences in this order; END stays the last of one that is cut."""
    return sequences(rows[i] if len(rows[i]) <= longest else [*rows[i][: longest - 1], END] for i in order)


def _notes(tokenizer: Any, short: np.ndarray, val: tuple[Sequences, Sequences], longest: int) -> dict[str, str]:
    left_out = int((~short).sum())
    cut = int((np.maximum(val[0].lengths, val[1].lengths) > longest).sum())
    return {
        "vocabulary": f"{tokenizer.get_vocab_size()} subwords of both languages",
        "training pairs": f"{short.sum()}" + f", without {left_out} of more than {longest} subwords" * bool(left_out),
        "validation pairs": f"{len(val[0])}" + f", {cut} of them cut to {longest} subwords" * bool(cut),
    }
