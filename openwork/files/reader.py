"""A checkpoint opened for reading: the compressed file, what `files.foreign` knows, or any safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from openwork.files.container import read_tensor
from openwork.files.foreign.compressed_tensors import Bitmask, bitmasks
from openwork.files.format import KEY, Fetch, Sparse, check_little_endian, described
from openwork.files.header import Stored, read_header
from openwork.utils.atomic import open_plain

FILE = "model.openwork.safetensors"  # the compressed file in a folder of other files


@dataclass(frozen=True)
class Contents:
    """An open model: its tensors by name, those of `sparse` compressed, and `aliases` (another name -> the first).
    `fetch_piecewise` reads one of `stored`."""

    stored: Mapping[str, Stored]
    sparse: Mapping[str, Sparse | Bitmask]
    aliases: Mapping[str, str]
    fetch_piecewise: Fetch

    def fetch(self, name: str) -> Tensor:
        """One of `stored` as it lies there."""
        return self.fetch_piecewise(name, None)

    @property
    def tensors(self) -> dict[str, Stored | Sparse | Bitmask]:
        """Every tensor of the model, aliases left out."""
        parts = {part for weight in self.sparse.values() for part in weight.parts}
        return {name: tensor for name, tensor in self.stored.items() if name not in parts} | dict(self.sparse)

    def names_of(self, name: str) -> tuple[str, ...]:
        """A tensor's name and its aliases."""
        return (name, *(alias for alias, first in self.aliases.items() if first == name))

    def in_memory(self) -> Contents:
        """The same, read and checked already: what happens to the file from now on changes nothing."""
        there: dict[str, Tensor] = {}
        for name, weight in self.sparse.items():
            with _naming(name):
                there |= zip(weight.parts, weight.fetch_checked(self.fetch_piecewise), strict=True)
        there |= {name: self.fetch(name) for name in self.stored if name not in there}
        return replace(self, fetch_piecewise=lambda name, _: there[name])

    def read(self, name: str) -> Tensor:
        """One tensor of the model, dense, on the CPU. Raises ValueError where the file is damaged."""
        name = self.aliases.get(name, name)
        if name not in self.sparse:
            return self.fetch(name)
        with _naming(name):
            return self.sparse[name].unpack(*map(self.fetch, self.sparse[name].parts))

    def check(self, name: str) -> None:
        """Raise what `read` would, without making a dense weight."""
        name = self.aliases.get(name, name)
        if name not in self.sparse:
            self.fetch(name)
            return
        with _naming(name):
            self.sparse[name].check(*map(self.fetch, self.sparse[name].parts))

    def read_into(self, name: str, target: Tensor) -> None:
        """Write what `read` gives to a tensor of its shape and dtype."""
        name = self.aliases.get(name, name)
        if name not in self.sparse:
            target.copy_(self.fetch(name))
            return
        with _naming(name):
            self.sparse[name].unpack_into(target, *map(self.fetch, self.sparse[name].parts))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"weight {name!r}: {error}") from error


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Contents]:
    """Open a file, or a folder: its model.openwork.safetensors, or else the files model*.safetensors that a model was
    cut into (of compressed-tensors alone). Headers are checked, tensors are not yet. Errors name the path."""
    check_little_endian()
    with open_files(path, _files(Path(path))) as files:
        yield _contents(files)


@contextmanager
def open_files(path: str | os.PathLike[str], files: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open the files of a checkpoint for reading; a ValueError while they are read names its path."""
    with ExitStack() as stack:
        try:
            yield [stack.enter_context(open_plain(file)) for file in files]
        except ValueError as error:
            text = str(error)  # with names from the file, which may be of any length
            text = text if len(text) < 2000 else f"{text[:1000]} ... {text[-500:]}"
            raise ValueError(f"{os.fspath(path)}: {text}") from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir() or (path / FILE).exists():
        return [path / FILE if path.is_dir() else path]
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} is a folder without {FILE} or model*.safetensors: name the file itself")
    return files


def _contents(files: Sequence[BinaryIO]) -> Contents:
    texts, places = joined(files)
    if KEY in texts and len(files) > 1:
        raise ValueError("several files, and ow.save writes one: name the file itself")
    stored = {name: tensor for name, (_, tensor) in places.items()}
    sparse: Mapping[str, Sparse | Bitmask] = {} if KEY in texts else bitmasks(stored)
    aliases: dict[str, str] = {}
    if not sparse:
        sparse, aliases = described(texts, stored)
    contents = Contents(stored, sparse, aliases, lambda name, seen: fetched(places, name, seen))
    _check_distinct(contents)
    return contents


def joined(files: Sequence[BinaryIO]) -> tuple[dict[str, str], dict[str, tuple[BinaryIO, Stored]]]:
    """The metadata of several files, and each tensor with the file that it lies in."""
    texts: dict[str, str] = {}
    places: dict[str, tuple[BinaryIO, Stored]] = {}
    for file in files:
        more, tensors = read_header(file)
        texts |= more
        for name in tensors.keys() & places.keys():
            raise ValueError(f"{name!r} lies in two files of the folder: name one of them")
        places |= {name: (file, tensor) for name, tensor in tensors.items()}
    return texts, places


def fetched(
    places: Mapping[str, tuple[BinaryIO, Stored]], name: str, seen: Callable[[Tensor, int], object] | None
) -> Tensor:
    """A tensor as it lies in a file; errors name it."""
    try:
        return read_tensor(*places[name], *([seen] if seen else []))
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from error


def _check_distinct(contents: Contents) -> None:
    """No name may mean two things."""
    tensors, aliases = contents.tensors, contents.aliases
    twice = contents.sparse.keys() & contents.stored.keys() | aliases.keys() & (tensors.keys() | contents.stored.keys())
    for name in twice:
        raise ValueError(f"the name {name!r} is given to two tensors")
    for name, first in aliases.items():
        if first not in tensors:
            raise ValueError(f"{name!r} is an alias of {first!r}, which is not in the file")
