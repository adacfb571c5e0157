"""The texts of sentences.py: paraphrases from Tatoeba, news documents with similarities that people gave."""

from __future__ import annotations

import gzip
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

QUERIES, DISTRACTORS = 1000, 3000


@dataclass(frozen=True)
class Retrieval:
    """Each of the queries has relevant sentences; they, the queries and others make the gallery."""

    queries: list[str]
    relevant: list[list[str]]
    gallery: list[str]


@dataclass(frozen=True)
class Corpus:
    """`groups`: English sentences that translate the same German one, in a fixed random order. The first thousand are
    the test, the next thousand the validation; nothing of either, nor of their galleries, is trained or calibrated
    on. `background`: 300 news documents, `judged`: 50 others, `likeness`: what people said of these, (50, 50)."""

    groups: list[list[str]]
    english: list[str]
    distractors: list[str]
    background: list[str]
    judged: list[str]
    likeness: np.ndarray

    @cached_property
    def test(self) -> Retrieval:
        return _retrieval(self.groups[:QUERIES], self.distractors)

    @cached_property
    def validation(self) -> Retrieval:
        order = np.random.default_rng(5).permutation(len(self.english))[:DISTRACTORS]
        return _retrieval(self.groups[QUERIES : 2 * QUERIES], [self.english[i] for i in order])

    @cached_property
    def training(self) -> list[str]:
        held = {*self.test.gallery, *self.validation.gallery}
        held |= {text for group in self.groups[: 2 * QUERIES] for text in group}
        return [text for text in self.english if text not in held]

    def calibration(self, seed: int) -> list[str]:
        """60 news documents and 1,500 sentences."""
        draw = np.random.default_rng(seed)
        documents = [self.background[i] for i in draw.permutation(len(self.background))[:60]]
        return documents + [self.training[i] for i in draw.permutation(len(self.training))[:1500]]


def read_corpus(packages: Path, data: Path) -> Corpus:
    english, german = (_lines(data / "tatoeba-en-de" / f"train.{language}.gz") for language in ("en", "de"))
    versions: dict[str, list[str]] = defaultdict(list)
    for one, other in zip(english, german, strict=True):
        if one and one not in versions[other]:
            versions[other].append(one)
    groups = [group for group in versions.values() if len({_letters(text) for text in group}) > 1]
    texts, draw = sorted({text for text in english if text}), np.random.default_rng(0)
    groups = [groups[i] for i in draw.permutation(len(groups))]
    distractors = [texts[i] for i in draw.permutation(len(texts))[:DISTRACTORS]]
    folder = packages / "gensim" / "test" / "test_data"
    background, judged = (_documents(folder / name) for name in ("lee_background.cor", "lee.cor"))
    return Corpus(groups, texts, distractors, background, judged, np.loadtxt(folder / "similarities0-1.txt"))


def _retrieval(groups: Sequence[list[str]], distractors: Sequence[str]) -> Retrieval:
    gallery = sorted({*distractors, *(text for group in groups for text in group)})
    return Retrieval([group[0] for group in groups], [group[1:] for group in groups], gallery)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower())


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read().split("\n")


def _documents(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
