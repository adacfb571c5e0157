"""Files that nobody saved: a good one in pieces, which each attack bends and puts together."""

from __future__ import annotations

import copy
import json
from typing import Any

SIZES = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1, "I64": 8, "BOOL": 1}

# (dtype, shape, bytes). fc.weight is 2:4, rows `1 0 0 2 | 0 0 0 0` and `0 3 4 0 | 0 0 5 0`; conv.weight is 3:7.
TENSORS: dict[str, tuple[str, list[int], bytes]] = {
    "fc.weight.values": (
        "F32",
        [2, 4],
        bytes.fromhex("0000803f000000400000000000000000 00004040000080400000000000 00a040"),
    ),
    "fc.bias": ("F32", [2], bytes.fromhex("0000003f000000bf")),
    "conv.weight.values": ("BF16", [1, 1, 1, 3], bytes.fromhex("803f00c04040")),
    "on": ("BOOL", [2], b"\0\1"),
    "conv.weight.indices": ("U8", [1], b"\x4a"),
    "fc.weight.indices": ("U8", [2], b"\x4c\x89"),
}
METADATA: dict[str, Any] = {
    "version": 1,
    "sparse": {
        "fc.weight": {
            "pattern": "2:4",
            "axis": {"dim": 1, "blocks": 1},
            "shape": [2, 8],
            "dtype": "F32",
            "packing": "indices",
        },
        "conv.weight": {
            "pattern": "3:7",
            "axis": {"dim": 1, "blocks": 1},
            "shape": [1, 7, 1, 1],
            "dtype": "BF16",
            "packing": "bitmask",
        },
    },
    "aliases": {"other": "fc.bias"},
}


def header_and_data(tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any) -> tuple[dict[str, Any], bytes]:
    """The header as an object, and the bytes of the tensors."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    header: dict[str, Any] = {"__metadata__": {"openwork": text}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return header, data


def file(header: Any, data: bytes = b"") -> bytes:
    """A file of a header (an object, text or bytes) and data."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


def good() -> bytes:
    return file(*header_and_data(TENSORS, METADATA))


def bent_metadata(*path: str, to: Any = None, drop: bool = False) -> bytes:
    """The good file with one field of the metadata set to something else, or dropped."""
    metadata = copy.deepcopy(METADATA)
    at = metadata
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return file(*header_and_data(TENSORS, metadata))


def bent_tensor(
    name: str, dtype: str | None = None, shape: list[int] | None = None, content: bytes | None = None
) -> bytes:
    """The good file with one tensor changed, its offsets and those after it as they then must be."""
    old = TENSORS[name]
    new = (dtype or old[0], old[1] if shape is None else shape, old[2] if content is None else content)
    return file(*header_and_data({**TENSORS, name: new}, METADATA))


def bent_header(name: str, **fields: Any) -> bytes:
    """The good file with fields of one tensor's header entry replaced, and nothing else."""
    header, data = header_and_data(TENSORS, METADATA)
    header[name] = {**header[name], **fields}
    return file(header, data)
