"""A folder as the Hugging Face Hub has them: dense weights with zeros, the compressed file, a model card."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from openwork.export.outputs import exportable
from openwork.files.checkpoint import Entry, describe, save
from openwork.files.container import write_tensors
from openwork.files.model_state import tensors_by_name, ties
from openwork.files.reader import FILE
from openwork.training.parametrize import unwrap
from openwork.training.record import sparsity_records
from openwork.training.selection import PatternChoice, Selection
from openwork.utils.atomic import usual_modes, write_text
from openwork.utils.counted import counted

DENSE, CARD = "model.safetensors", "README.md"
_BEGIN, _END = "<!-- openwork: begin -->", "<!-- openwork: end -->"


def to_huggingface(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    pattern: Selection | PatternChoice | None = None,
    method: str = "",
) -> str:
    """Write a folder that `from_pretrained` and any safetensors reader load, with the compressed file beside; returns
    the part about sparsity of its model card.

    A model with `save_pretrained` (transformers and others) writes its own files, with the zeros in them; of any other
    the weights are written as model.safetensors. README.md is made, or gets the part about
    sparsity, which is replaced when it is written again. `pattern` as in `ow.save`; `method` is
    named in the card, and known for a model that is still sparsified.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = sparsity_records(unwrap(model))
    method = method or ", ".join(sorted({record.method.name for _, _, record in records}))
    save(model, folder / FILE, pattern=pattern)
    _write_dense(exportable(model), folder)
    snippet = card(describe(folder / FILE), method)
    _put_into(folder / CARD, snippet)
    return snippet


def card(entries: Sequence[Entry], method: str = "") -> str:
    """The part of a model card that says how sparse a compressed file is, in Markdown."""
    sparse = [each for each in entries if each.pattern and not each.pattern.is_dense and not each.alias_of]
    dense = sum(_dense_bytes(entry) for entry in entries if not entry.alias_of)
    stored = sum(entry.bytes for entry in entries)
    counts = Counter(str(entry.pattern) for entry in sparse)
    listed = ", ".join(f"{text} in {counted(n, 'weight')}" for text, n in counts.items()) or "none"
    weights = sum(_size(entry) for entry in sparse)
    kept = sum(entry.density * _size(entry) for entry in sparse)
    rows = {
        "pattern": f"{listed} (at most N non-zero of every M consecutive along the input channels)",
        "method": method or "not recorded",
        "density of the sparse weights": f"{kept / weights:.4f}" if weights else "-",
        "sparse share of all parameters": f"{weights / max(1, sum(_size(e) for e in entries if not e.alias_of)):.3f}",
        "compressed file": f"`{FILE}`, {stored:,} bytes of {dense:,} ({stored / max(1, dense):.3f})",
    }
    lines = [_BEGIN, "## N:M sparsity", "", "| | |", "|---|---|"]
    lines += [f"| {what} | {text} |" for what, text in rows.items()]
    loads = (
        f"Any library loads `{DENSE}`, dense with exact zeros; `ow.load_state_dict(folder)` reads the compressed file."
    )
    lines += ["", loads]
    return "\n".join([*lines, _END, ""])


def _write_dense(model: Any, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        with usual_modes(folder, "*.safetensors"):
            model.save_pretrained(folder)
        return
    tensors = tensors_by_name(model)
    own = {name: tensor for name, tensor in tensors.items() if name not in ties(tensors, {})}
    write_tensors(folder / DENSE, own, {"format": "pt"})


def _put_into(path: Path, snippet: str) -> None:
    """Replace the part between the marks, or append it."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2].lstrip("\n") if begin else ""
    write_text(path, (before.rstrip("\n") + "\n\n" + snippet + after).lstrip("\n"))


def _size(entry: Entry) -> int:
    size = 1
    for length in entry.shape:
        size *= length
    return size


def _dense_bytes(entry: Entry) -> int:
    return _size(entry) * entry.dtype.itemsize
