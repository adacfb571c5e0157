"""The safetensors container: its header read strictly, its tensors one by one, and a file written whole or not at all.

The reader stands next to safetensors' own because it reports what lies in a file without mapping it (a mapped file
that someone shortens kills the process), and refuses what that one lets pass: names given twice, fields that nobody
defined. A test holds that it accepts nothing that safetensors refuses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from openwork.files.strict_json import check_unicode, is_shape, is_text_mapping, strict_json
from openwork.utils.atomic import atomic_file

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


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file, at bytes `start` to `stop`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the tensors of a safetensors file, from its header alone. Raises ValueError for any flaw."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{size} bytes, a header of {length}: cut short, or not a safetensors file")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("the header does not begin with '{': not a safetensors file")
    header = strict_json(text.decode("utf-8"))
    metadata = header.pop("__metadata__", {})
    if not is_text_mapping(metadata):
        raise ValueError("__metadata__ is not a mapping of text to text")
    stored = {check_unicode(name): _stored(name, entry, 8 + length) for name, entry in header.items()}
    _check_no_holes(stored, 8 + length, size)
    return metadata, stored


def read_tensor(file: BinaryIO, stored: Stored) -> Tensor:
    """One tensor, in memory of its own on the CPU."""
    if stored.start == stored.stop:
        return torch.empty(stored.shape, dtype=stored.dtype)
    buffer = bytearray(stored.stop - stored.start)
    file.seek(stored.start)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise ValueError("the file became shorter while it was read")
    if stored.dtype == torch.bool and max(buffer) > 1:
        raise ValueError("a boolean is neither 0 nor 1: the file is damaged")
    return torch.frombuffer(buffer, dtype=stored.dtype).reshape(stored.shape)


def write(
    path: str | os.PathLike[str],
    layout: Mapping[str, Layout],
    contents: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file atomically: whatever happens at whatever moment, `path` is the old file or the new one.

    `layout` says dtype and shape of each tensor, so that the header is known before the first is made; `contents` gives
    them one at a time, in any order. A process that is killed leaves a hidden file that ends in `.part` beside `path`,
    which may be deleted. The bytes are those of safetensors' own writer.
    """
    stored, header = _laid_out(layout, metadata)
    with atomic_file(path) as part, open(part, "wb") as file:
        file.write(header)
        file.truncate(max((tensor.stop for tensor in stored.values()), default=len(header)))
        missing = dict(stored)
        for name, tensor in contents:
            _put(file, tensor, missing.pop(name))
        if missing:
            raise RuntimeError(f"no content was given for {', '.join(missing)}")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write` what is in memory already, each tensor under its name."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write(path, layout, tensors.items(), metadata)


def _laid_out(layout: Mapping[str, Layout], metadata: Mapping[str, str]) -> tuple[dict[str, Stored], bytes]:
    """Where each tensor lies in a file, and the bytes before the first."""
    ordered = sorted(layout, key=lambda name: (_ORDER.index(CODES[layout[name][0]]), name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places, stop = {}, 0
    for name in ordered:
        dtype, shape = layout[name]
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        places[name] = start, stop
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"the names and shapes take {len(text)} bytes, more than the {_LONGEST_HEADER} of a header")
    base = 8 + len(text)
    stored = {name: Stored(*layout[name], base + start, base + stop) for name, (start, stop) in places.items()}
    return stored, len(text).to_bytes(8, "little") + text


def _put(file: BinaryIO, tensor: Tensor, stored: Stored) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (stored.dtype, stored.shape):
        raise RuntimeError(f"laid out as {stored}, found {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.numel():
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        file.seek(stored.start)
        file.write(plain.reshape(-1).view(torch.uint8).numpy().data)


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
