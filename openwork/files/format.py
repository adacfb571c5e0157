"""The compressed file: what `docs/format.md` says about metadata and names, executed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openwork.files.header import CHECKSUMS, CODES, DTYPES, Stored
from openwork.files.packing import (
    PACKABLE,
    check_packed,
    check_while_read,
    packed_shape,
    unpack_into,
    unpack_weight,
    unpacks_in_place,
    uses_bitmask,
)
from openwork.files.strict_json import check_unicode, is_shape, is_text_mapping, strict_json
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern

VERSION = 2  # what is written; 1 is the same without checksums, and is read
KEY = "openwork"  # in the safetensors metadata; other keys are others' business
VALUES, INDICES = ".values", ".indices"


Fetch = Callable[[str, Callable[[Tensor, int], object] | None], Tensor]
"""Reads a tensor of a file by name; see `container.read_tensor` for the rest."""


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

    def check(self, values: Tensor, indices: Tensor) -> None:
        """Raise what `unpack` would."""
        check_packed(values, indices, self.pattern, self.axis, self.shape)

    def fetch_checked(self, fetch: Fetch) -> tuple[Tensor, ...]:
        """The parts, looked at while they are read. Raises what `unpack` would."""
        values, indices = self.parts
        codes = fetch(indices, None)
        seen, end = check_while_read(codes, self.pattern, self.axis, self.shape)
        there = fetch(values, seen)
        end(there)
        return there, codes

    def unpacks_in_place(self, weight: Tensor) -> bool:
        """Whether `unpack_into` needs no memory beside the weight."""
        return unpacks_in_place(weight, self.axis)

    def unpack_into(self, weight: Tensor, values: Tensor, indices: Tensor) -> None:
        """Write what `unpack` gives to a tensor of this shape and dtype."""
        if not weight.is_cpu:
            weight.copy_(self.unpack(values, indices))
            return
        unpack_into(weight, values, indices, self.pattern, self.axis)
        weight.detach()[:0].zero_()  # for whoever asks autograd whether the tensor changed


def check_little_endian() -> None:
    """Raise ValueError on a big-endian processor."""
    if sys.byteorder != "little":
        raise ValueError("compressed files are little-endian, this processor is not: convert the file on one that is")


def metadata(sparse: Mapping[str, Sparse], aliases: Mapping[str, str]) -> dict[str, str]:
    """The safetensors metadata of a file."""
    described = {
        "version": VERSION,
        "sparse": {name: _described(weight) for name, weight in sparse.items()},
        "aliases": dict(aliases),
    }
    return {KEY: json.dumps(described, sort_keys=True, separators=(",", ":"))}


def check_free_names(names: Sequence[str], sparse: Iterable[str]) -> None:
    """Raise ValueError where a tensor of the model has a name that the format needs for itself."""
    needed = {name + end for name in sparse for end in (VALUES, INDICES)} | {"__metadata__"}
    for name in needed.intersection(names):
        raise ValueError(f"{name} is the name of a tensor and needed by the format: rename it, or exclude the weight")


def _described(weight: Sparse) -> dict[str, Any]:
    return {
        "pattern": str(weight.pattern),
        "axis": "kernel" if weight.axis.flat else {"dim": weight.axis.dim, "blocks": weight.axis.blocks},
        "shape": list(weight.shape),
        "dtype": CODES[weight.dtype],
        "packing": _packing(weight.pattern),
    }


def _packing(pattern: Pattern) -> str:
    return "bitmask" if uses_bitmask(pattern) else "indices"


def described(texts: Mapping[str, str], stored: Mapping[str, Stored]) -> tuple[dict[str, Sparse], dict[str, str]]:
    """What the metadata says: compressed weights and aliases. Raises ValueError unless it fits the tensors."""
    if KEY not in texts:
        raise ValueError(
            "not written by ow.save; safetensors.torch.load_file reads ordinary safetensors files, and openwork verify "
            "says which N:M their weights are"
        )
    # Of a weight there are two tensors and some ten values; other names of tensors may be many.
    fields = strict_json(texts[KEY], max(250_000, 32 * len(stored)))
    _check_version(fields.get("version"), texts, stored)
    _check_fields("the metadata", fields, {"version", "sparse", "aliases"})
    if not isinstance(fields["sparse"], dict) or not is_text_mapping(fields["aliases"]):
        raise ValueError("the metadata's sparse or aliases are no mapping")
    sparse = {name: _sparse(name, entry, stored) for name, entry in fields["sparse"].items()}
    for name in fields["aliases"]:
        check_unicode(name)
    return sparse, fields["aliases"]


def _check_version(version: Any, texts: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"format version {str(version)[:20]}; this Openwork reads 1 to {VERSION}: install a newer one")
    if version > 1 and (CHECKSUMS not in texts or any(each.crc32 is None for each in stored.values())):
        raise ValueError(
            f"the header: format version {version} without checksums at its beginning: the file is damaged, or another "
            "program rewrote it; copy or make it anew"
        )


def _parts(name: str) -> tuple[str, ...]:
    return name + VALUES, name + INDICES


def _sparse(name: str, fields: Any, stored: Mapping[str, Stored]) -> Sparse:
    """One entry of the metadata, held against the tensors that are really there."""
    where = f"weight {name!r}"
    _check_fields(where, fields, {"pattern", "axis", "shape", "dtype", "packing"})
    if not is_shape(fields["shape"]):
        raise ValueError(f"{where}: its shape is not a short list of lengths")
    shape, pattern = tuple(fields["shape"]), _pattern(where, fields["pattern"])
    dtype = DTYPES.get(_text(where, fields["dtype"]))
    if dtype not in PACKABLE:
        raise ValueError(f"{where}: dtype {fields['dtype'][:20]!r} cannot be compressed")
    if fields["packing"] != _packing(pattern):
        raise ValueError(f"{where}: needed packing {_packing(pattern)!r}, the smaller one at {pattern}")
    axis = _axis(where, fields["axis"])
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


def _pattern(where: str, text: Any) -> Pattern:
    try:
        pattern = Pattern.parse(_text(where, text)[:20])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if str(pattern) != text:
        raise ValueError(f"{where}: found pattern {text[:20]!r}; it is written '{pattern}'")
    return pattern


def _axis(where: str, value: Any) -> Axis:
    if value == "kernel":
        return Axis(flat=True)
    _check_fields(f"{where}: its axis", value, {"dim", "blocks"})
    if type(value["dim"]) is not int or type(value["blocks"]) is not int:
        raise ValueError(f"{where}: its axis is not made of integers")
    return Axis(value["dim"], value["blocks"])


def _check_fields(where: str, value: Any, needed: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != needed:
        raise ValueError(f"{where}: needed exactly the fields {', '.join(sorted(needed))}")


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: found {type(value).__name__} where text is needed")
    return value
