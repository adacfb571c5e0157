"""The compressed file: what `docs/format.md` says about metadata and names, executed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openwork.files.container import (
    CODES,
    DTYPES,
    Stored,
)
from openwork.files.packing import PACKABLE, packed_shape, unpack_weight, uses_bitmask
from openwork.files.strict_json import check_unicode, is_shape, is_text_mapping, strict_json
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern

VERSION = 1
KEY = "openwork"  # in the safetensors metadata; other keys are others' business
VALUES, INDICES = ".values", ".indices"


@dataclass(frozen=True)
class Sparse:
    """How one compressed weight is to be read. `parts` are the names of its tensors."""

    pattern: Pattern
    axis: Axis
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]

    @classmethod
    def of(cls, name: str, weight: Tensor, pattern: Pattern, axis: Axis) -> Sparse:
        """How a weight of a model is to be stored."""
        return cls(pattern, axis, tuple(weight.shape), weight.dtype, _parts(name))

    def unpack(self, values: Tensor, indices: Tensor) -> Tensor:
        """The dense weight. Raises ValueError where the tensors break a rule."""
        return unpack_weight(values, indices, self.pattern, self.axis, self.shape)


def check_little_endian() -> None:
    """Raise ValueError on a big-endian machine."""
    if sys.byteorder != "little":
        raise ValueError("compressed files are little-endian, this machine is not: convert the file on one that is")


def metadata(sparse: Mapping[str, Sparse], aliases: Mapping[str, str]) -> dict[str, str]:
    """The safetensors metadata of a file."""
    found = {
        "version": VERSION,
        "sparse": {name: _described(each) for name, each in sparse.items()},
        "aliases": dict(aliases),
    }
    return {KEY: json.dumps(found, sort_keys=True, separators=(",", ":"))}


def check_free_names(names: Sequence[str], sparse: Iterable[str]) -> None:
    """Raise ValueError where a tensor of the model has a name that the format needs for itself."""
    needed = {name + end for name in sparse for end in (VALUES, INDICES)} | {"__metadata__"}
    for name in needed.intersection(names):
        raise ValueError(f"{name} is the name of a tensor and needed by the format: rename it, or exclude the weight")


def _described(each: Sparse) -> dict[str, Any]:
    return {
        "pattern": str(each.pattern),
        "axis": "kernel" if each.axis.flat else {"dim": each.axis.dim, "blocks": each.axis.blocks},
        "shape": list(each.shape),
        "dtype": CODES[each.dtype],
        "packing": _packing(each.pattern),
    }


def _packing(pattern: Pattern) -> str:
    return "bitmask" if uses_bitmask(pattern) else "indices"


def described(texts: Mapping[str, str], stored: Mapping[str, Stored]) -> tuple[dict[str, Sparse], dict[str, str]]:
    """What the metadata says: compressed weights and aliases. Raises ValueError unless it fits the tensors."""
    if KEY not in texts:
        raise ValueError("not written by ow.save; safetensors.torch.load_file reads ordinary safetensors files")
    found = strict_json(texts[KEY])
    if type(found.get("version")) is not int or found["version"] != VERSION:
        version = str(found.get("version"))[:20]
        raise ValueError(f"format version {version}; this Openwork reads {VERSION}: install a newer one")
    _check_fields("the metadata", found, {"version", "sparse", "aliases"})
    if not isinstance(found["sparse"], dict) or not is_text_mapping(found["aliases"]):
        raise ValueError("the metadata's sparse or aliases are no mapping")
    sparse = {name: _sparse(name, each, stored) for name, each in found["sparse"].items()}
    for name in found["aliases"]:
        check_unicode(name)
    return sparse, found["aliases"]


def _parts(name: str) -> tuple[str, ...]:
    return name + VALUES, name + INDICES


def _sparse(name: str, found: Any, stored: Mapping[str, Stored]) -> Sparse:
    """One entry of the metadata, held against the tensors that are really there."""
    where = f"weight {name!r}"
    _check_fields(where, found, {"pattern", "axis", "shape", "dtype", "packing"})
    if not is_shape(found["shape"]):
        raise ValueError(f"{where}: its shape is not a short list of lengths")
    shape, pattern = tuple(found["shape"]), _pattern(where, found["pattern"])
    dtype = DTYPES.get(_text(where, found["dtype"]))
    if dtype not in PACKABLE:
        raise ValueError(f"{where}: dtype {found['dtype'][:20]!r} cannot be compressed")
    if found["packing"] != _packing(pattern):
        raise ValueError(f"{where}: needed packing {_packing(pattern)!r}, the smaller one at {pattern}")
    axis = _axis(where, found["axis"])
    try:
        values_shape, index_bytes = packed_shape(shape, pattern, axis)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for end, kind, needed in ((VALUES, dtype, values_shape), (INDICES, torch.uint8, (index_bytes,))):
        part = stored.get(name + end)
        if part is None or part.dtype != kind or part.shape != needed:
            there = "missing" if part is None else f"{part.dtype} {part.shape}"
            raise ValueError(f"{where}: {name + end!r} is {there}; needed {kind} {needed}")
    return Sparse(pattern, axis, shape, dtype, _parts(name))


def _pattern(where: str, found: Any) -> Pattern:
    try:
        pattern = Pattern.parse(_text(where, found)[:20])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if str(pattern) != found:
        raise ValueError(f"{where}: found pattern {found[:20]!r}; it is written '{pattern}'")
    return pattern


def _axis(where: str, found: Any) -> Axis:
    if found == "kernel":
        return Axis(flat=True)
    _check_fields(f"{where}: its axis", found, {"dim", "blocks"})
    if type(found["dim"]) is not int or type(found["blocks"]) is not int:
        raise ValueError(f"{where}: its axis is not made of integers")
    return Axis(found["dim"], found["blocks"])


def _check_fields(where: str, found: Any, needed: set[str]) -> None:
    if not isinstance(found, dict) or found.keys() != needed:
        raise ValueError(f"{where}: needed exactly the fields {', '.join(sorted(needed))}")


def _text(where: str, found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{where}: found {type(found).__name__} where text is needed")
    return found
