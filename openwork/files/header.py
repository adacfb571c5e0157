"""The header of a safetensors file: read strictly, written, and guarded by checksums (docs/format.md, Checksums).

    length, 8 bytes |{"__metadata__":{"openwork.crc32":"hhhhhhhhaaaaaaaabbbbbbbb...", ...}, "name": {...}, ...}| data

Entries are read one after the other, each into a `Stored`: whatever JSON a header holds, what it unfolds to in memory
stays in proportion to the tensors that it names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from openwork.files.recognize import not_safetensors
from openwork.files.strict_json import Cursor, check_unicode, is_shape
from openwork.utils.checksum import DIGITS, as_text, crc32
from openwork.utils.counted import counted

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Layout = tuple[torch.dtype, tuple[int, ...]]
# safetensors' writer puts tensors in this order, which aligns each to its items, then by name.
_ORDER = [
    "U64",
    "I64",
    "F64",
    "C64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
]
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_LONGEST_ENTRY = 8192  # characters; 64 dims take 1,300
_MOST_TENSORS = 1 << 18  # of which each takes some 500 bytes of memory; the largest models have 100,000

CHECKSUMS = "openwork.crc32"  # in the safetensors metadata
_SEAL = f'{{"__metadata__":{{"{CHECKSUMS}":"'.encode()  # how a header with checksums begins; their digits follow
_SEALED_AT = 8 + len(_SEAL)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in the file, at bytes `start` to `stop`; `crc32` of these bytes, if the file says it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    crc32: int | None = None


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the tensors of a safetensors file, from its header alone. Raises ValueError for any flaw, which
    says what else the file is, where it is none of safetensors."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(
            not_safetensors(file, f"it should take {length} bytes, the file has {size}: cut short, or damaged")
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError(not_safetensors(file, "damaged"))
    try:
        _check_seal(length.to_bytes(8, "little"), text)
        metadata, stored = _read_entries(text.decode("utf-8"), 8 + length)
        _check_no_holes(stored, 8 + length, size)
        return metadata, _with_checksums(stored, text) if text.startswith(_SEAL) else stored
    except ValueError as error:
        raise ValueError(f"the header: {error}") from error


def laid_out(layout: Mapping[str, Layout], metadata: Mapping[str, str]) -> tuple[dict[str, Stored], bytes]:
    """Where each tensor lies in a file, in that order, and the bytes before the first, with zeros for checksums."""
    ordered = sorted(layout, key=lambda name: (_ORDER.index(CODES[layout[name][0]]), name.encode()))
    header: dict[str, Any] = {"__metadata__": {CHECKSUMS: "0" * DIGITS * (1 + len(layout)), **metadata}}
    places, stop = {}, 0
    for name in ordered:
        dtype, shape = layout[name]
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        places[name] = start, stop
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER or len(layout) > _MOST_TENSORS:
        raise ValueError(
            f"the names and shapes of {counted(len(layout), 'tensor')} take {len(text)} bytes; a file holds at most "
            f"{_MOST_TENSORS} and {_LONGEST_HEADER}: save the model in parts"
        )
    base = 8 + len(text)
    stored = {name: Stored(*layout[name], base + start, base + stop) for name, (start, stop) in places.items()}
    return stored, len(text).to_bytes(8, "little") + text


def sealed(header: bytes, checksums: Sequence[int]) -> bytes:
    """The bytes before the first tensor, with the checksums of all tensors in their order, and their own."""
    digits = "".join(map(as_text, checksums)).encode()
    first = _SEALED_AT + DIGITS
    header = header[:first] + digits + header[first + len(digits) :]
    return header[:_SEALED_AT] + as_text(crc32(header)).encode() + header[first:]


def _check_seal(length: bytes, text: bytes) -> None:
    """Raise ValueError where a header with checksums is not what was written."""
    if not text.startswith(_SEAL):
        return
    first, after = len(_SEAL), len(_SEAL) + DIGITS
    found = as_text(crc32(text[after:], crc32(b"0" * DIGITS, crc32(length + text[:first]))))
    if text[first:after] != found.encode():
        says = text[first:after].decode("ascii", "replace")
        raise ValueError(
            f"its CRC-32 is {found} and should be {says!r}: the file is damaged, or another program rewrote it; copy "
            "or make it anew"
        )


def _with_checksums(stored: dict[str, Stored], text: bytes) -> dict[str, Stored]:
    """The tensors with the checksums of the header, which stand in the order of the data."""
    digits = text[len(_SEAL) : text.index(b'"', len(_SEAL))]
    if len(digits) != DIGITS * (1 + len(stored)) or not re.fullmatch(b"[0-9a-f]*", digits):
        raise ValueError(f"needed {DIGITS} hexadecimal digits for itself and each of {counted(len(stored), 'tensor')}")
    sealed_tensors = {}
    for i, name in enumerate(sorted(stored, key=lambda name: _place(stored[name])), 1):
        each, checksum = stored[name], int(digits[DIGITS * i : DIGITS * (i + 1)], 16)
        sealed_tensors[name] = Stored(each.dtype, each.shape, each.start, each.stop, checksum)
    return {name: sealed_tensors[name] for name in stored}


def _place(stored: Stored) -> tuple[int, int]:
    return stored.start, stored.stop


def _read_entries(text: str, base: int) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the tensors that a header's JSON names."""
    cursor, metadata = Cursor(text), None
    stored: dict[str, Stored] = {}
    for name in cursor.members():
        if name in stored or (name == "__metadata__" and metadata is not None):
            raise ValueError(f"the name {name!r} is given twice")
        if name == "__metadata__":
            metadata = _read_metadata(cursor)
        elif len(stored) == _MOST_TENSORS:
            raise ValueError(f"it names more than {_MOST_TENSORS} tensors, the limit")
        else:
            stored[check_unicode(name)] = _stored(name, _read_entry(name, cursor), base)
    cursor.end()
    return metadata or {}, stored


def _read_metadata(cursor: Cursor) -> dict[str, str]:
    metadata: dict[str, str] = {}
    try:
        for key in cursor.members():
            if key in metadata:
                raise ValueError(f"the name {key!r} is given twice")
            metadata[key] = cursor.text_value()
    except TypeError:
        raise ValueError("__metadata__ is not a mapping of text to text") from None
    return metadata


def _read_entry(name: str, cursor: Cursor) -> Any:
    try:
        return cursor.value(_LONGEST_ENTRY)
    except OverflowError:
        raise ValueError(
            f"tensor {name!r}: more than {_LONGEST_ENTRY} characters: nested too deep, or its shape is not a short "
            "list of lengths"
        ) from None


def _stored(name: str, entry: Any, base: int) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: needed exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name!r}: unknown dtype {str(code)[:20]!r}; known are {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"tensor {name!r}: its shape is not a short list of lengths")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int or at < 0 for at in offsets):
        raise ValueError(f"tensor {name!r}: its data_offsets are not two positions")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"tensor {name!r}: shape {shape} in {code} does not fill {offsets[1] - offsets[0]} bytes")
    return Stored(DTYPES[code], tuple(shape), base + offsets[0], base + offsets[1])


def _check_no_holes(stored: dict[str, Stored], start: int, size: int) -> None:
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != start:
            raise ValueError(f"tensor {name!r} begins at byte {tensor.start}, the one before it ends at {start}")
        start = tensor.stop
    if start != size:
        raise ValueError(f"the tensors end at byte {start}, the file at {size}: cut short, or something was added")
