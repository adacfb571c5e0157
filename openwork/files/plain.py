"""Ordinary safetensors files: one, or a folder of them as Hugging Face has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openwork.files.foreign.compressed_tensors import bitmasks
from openwork.files.format import KEY, check_little_endian
from openwork.files.header import read_header
from openwork.files.reader import FILE, Contents, fetched, joined, open_files
from openwork.files.strict_json import is_text_mapping, read_json


@contextmanager
def opened_plain(path: str | os.PathLike[str]) -> Iterator[Contents]:
    """Open them: every tensor is dense, and nothing is checked of it. Errors name the path."""
    check_little_endian()
    with open_files(path, plain_files(path)) as files:
        _, places = joined(files)
        stored = {name: tensor for name, (_, tensor) in places.items()}
        yield Contents(stored, {}, {}, lambda name, seen: fetched(places, name, seen))


def plain_files(path: str | os.PathLike[str]) -> list[Path]:
    """The file, or the files of a folder, if they are ordinary safetensors files; none where one is compressed (but for
    model.openwork.safetensors, which may lie beside them). Of a folder with an index, the files that it lists. Raises
    ValueError where there are only files of other kinds."""
    path = Path(path)
    files = [file for file in _listed(path) if file.name != FILE] if path.is_dir() else [path]
    return [] if any(_is_compressed(file) for file in files) else files


def _listed(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has {len(indices)} indices, {indices[0].name} and others: name the file itself")
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            others = ", ".join(file.name for file in sorted(folder.glob("*.bin"))[:2])
            raise ValueError(
                f"{folder} has no safetensors file{f', only {others}, which are pickles' if others else ''}; needed "
                "*.safetensors: model.save_pretrained(folder) of transformers writes them"
            )
        return files
    names: Any = read_json(indices[0]).get("weight_map")
    if not is_text_mapping(names) or any(Path(name).name != name for name in names.values()):
        raise ValueError(f"{indices[0]}: its weight_map does not map names of weights to names of files in the folder")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        listed = f"{', '.join(missing[:3])} ({len(missing)} in all)"
        raise FileNotFoundError(f"{indices[0]} lists {listed}, which the folder lacks: fetch them too")
    return files


def _is_compressed(path: Path) -> bool:
    with open_files(path, [path]) as (file,):
        texts, tensors = read_header(file)
        return KEY in texts or bool(bitmasks(tensors))
