"""Each attack: its name -> (the file, what the error must say)."""

from __future__ import annotations

import json

from attacks.forge import METADATA, TENSORS, bent_header, bent_metadata, bent_tensor, file, good, header_and_data

GOOD = good()
HEADER, DATA = header_and_data(TENSORS, METADATA)
FC = ("sparse", "fc.weight")
DEEP = "[" * 100_000 + "]" * 100_000


def with_metadata(text: str) -> bytes:
    return file(*header_and_data(TENSORS, text))


def huge(pattern: str, shape: list[int], dtype: str = "F32") -> bytes:
    entry = {**METADATA["sparse"]["fc.weight"], "pattern": pattern, "shape": shape, "dtype": dtype}
    return file(*header_and_data(TENSORS, {**METADATA, "sparse": {"fc.weight": entry}}))


def twice(text: str) -> bytes:
    """The good header with a piece of text inserted after its opening brace."""
    return file("{" + text + "," + json.dumps(HEADER)[1:], DATA)


CONTAINER = {
    "empty file": (b"", "cut short"),
    "seven bytes": (b"\1" * 7, "cut short"),
    "length beyond the file": ((2**40).to_bytes(8, "little") + b"{}", "cut short"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "cut short"),
    "header cut": (GOOD[:100], "cut short"),
    "data cut": (GOOD[:-1], "the tensors end at byte"),
    "data appended": (GOOD + b"\0", "the tensors end at byte"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 40, "it is a pickle.*torch.load"),
    "list": (file("[]"), "does not begin"),
    "space first": (file(" {}"), "does not begin"),
    "no metadata": (file({}), "not written by ow.save"),
    "not JSON": (file("{nonsense}"), "Expecting"),
    "not UTF-8": (file(b'{"\xff": 1}'), "utf-8"),
    "half a surrogate": (twice(r'"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'), "not valid Unicode"),
    "deep": (file('{"a":' + DEEP + "}"), "nested too deep"),
    "tensor twice": (twice('"on":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}'), "'on' is given twice"),
    "metadata twice": (twice('"__metadata__":{}'), "'__metadata__' is given twice"),
    "metadata of numbers": (file({"__metadata__": {"openwork": 1}}), "text to text"),
    "metadata a list": (file({"__metadata__": []}), "text to text"),
    "NaN": (file('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "NaN is not JSON"),
    "number of 5000 digits": (file('{"a":' + "9" * 5000 + "}"), "digits|needed exactly"),
    "entry is a number": (file({"a": 3}), "needed exactly dtype"),
    "unknown field": (bent_header("on", extra=1), "needed exactly dtype"),
    "unknown dtype": (bent_header("on", dtype="X9"), "unknown dtype"),
    "dtype is a list": (bent_header("on", dtype=["BOOL"]), "unknown dtype"),
    "dtype of half a byte": (
        file({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"),
        "unknown dtype",
    ),
    "shape too large": (bent_header("on", shape=[3]), "does not fill 2 bytes"),
    "shape too small": (bent_header("on", shape=[1]), "does not fill 2 bytes"),
    "shape negative": (bent_header("on", shape=[-1, -2]), "not a short list of lengths"),
    "shape of fractions": (bent_header("on", shape=[2.0]), "not a short list of lengths"),
    "shape of booleans": (bent_header("on", shape=[True, 2]), "not a short list of lengths"),
    "shape overflows": (bent_header("on", shape=[2**32, 2**32]), "not a short list of lengths"),
    "shape overflows to 2": (bent_header("on", shape=[2**63, 2**2 - 2]), "not a short list of lengths"),
    "empty shape overflows": (bent_header("on", shape=[0, 2**62, 2**62]), "not a short list of lengths"),
    "a million dims": (bent_header("on", shape=[1] * 1_000_000), "not a short list of lengths"),
    "offsets reversed": (bent_header("on", data_offsets=[2, 0]), "does not fill"),
    "offsets negative": (bent_header("on", data_offsets=[-2, 0]), "two positions"),
    "offsets beyond the file": (bent_header("on", data_offsets=[10**12, 10**12 + 2]), "begins at byte|end at byte"),
    "three offsets": (bent_header("on", data_offsets=[0, 1, 2]), "two positions"),
    "offsets are text": (bent_header("on", data_offsets=["0", "2"]), "two positions"),
    "overlap": (bent_header("on", data_offsets=[45, 47]), "begins at byte"),
    "hole": (bent_header("on", data_offsets=[47, 49]), "begins at byte"),
    "same bytes twice": (twice('"a":{"dtype":"BOOL","shape":[2],"data_offsets":[46,48]}'), "begins at byte"),
    "boolean of 2": (bent_tensor("on", content=b"\0\2"), "neither 0 nor 1"),
}

PATTERNS = {
    f"pattern {text!r}": (bent_metadata(*FC, "pattern", to=text), complaint)
    for text, complaint in {
        "": "pattern",
        "nan:4": "pattern",
        "NaN": "pattern",
        "0:4": "pattern",
        "5:4": "pattern",
        "2:65": "pattern",
        "64:128": "pattern",
        "-2:4": "pattern",
        "2:-4": "pattern",
        "02:4": "it is written '2:4'",
        " 2:4": "it is written '2:4'",
        "2:4\n": "it is written '2:4'",
        "٢:4": "pattern",
        "2e0:4": "pattern",
        "2:" + "4" * 10_000: "pattern",
        "1:4": r"\.values' is .*; needed torch.float32 \(2, 2\)",
        "4:8": "needed packing 'bitmask'",
        "2:2": r"\.values' is .*; needed torch.float32 \(2, 8\)",
    }.items()
}

METADATA_ATTACKS = {
    "not an object": (with_metadata("[]"), "needed an object"),
    "not JSON": (with_metadata("version 1"), "Expecting"),
    "deep": (with_metadata('{"version":' + DEEP + "}"), "nested too deep"),
    "deep in a weight": (with_metadata('{"version":1,"aliases":{},"sparse":{"a":' + DEEP + "}}"), "nested too deep"),
    "infinity": (with_metadata('{"version":Infinity}'), "Infinity is not JSON"),
    "version twice": (with_metadata('{"version":1,"version":1}'), "'version' is given twice"),
    "no version": (bent_metadata("version", drop=True), "format version None"),
    "version 2": (bent_metadata("version", to=2), "format version 2"),
    "version 1.0": (bent_metadata("version", to=1.0), "format version 1.0"),
    "version true": (bent_metadata("version", to=True), "format version True"),
    "version '1'": (bent_metadata("version", to="1"), "format version 1"),
    "version of 4000 digits": (with_metadata('{"version":' + "1" * 4000 + "}"), "format version 1111"),
    "unknown field": (bent_metadata("code", to="import os"), "needed exactly the fields"),
    "no aliases": (bent_metadata("aliases", drop=True), "needed exactly the fields"),
    "sparse a list": (bent_metadata("sparse", to=[]), "no mapping"),
    "aliases of numbers": (bent_metadata("aliases", to={"a": 1}), "no mapping"),
    "weight null": (bent_metadata(*FC, to=None), "needed exactly the fields"),
    "weight with more": (bent_metadata(*FC, "loader", to="eval"), "needed exactly the fields"),
    "weight with less": (bent_metadata(*FC, "packing", drop=True), "needed exactly the fields"),
    "pattern a list": (bent_metadata(*FC, "pattern", to=[2, 4]), "found list where text"),
    "pattern null": (bent_metadata(*FC, "pattern", to=None), "found NoneType where text"),
    "dtype a number": (bent_metadata(*FC, "dtype", to=4), "found int where text"),
    "dtype unknown": (bent_metadata(*FC, "dtype", to="F99"), "cannot be compressed"),
    "dtype boolean": (bent_metadata(*FC, "dtype", to="BOOL"), "cannot be compressed"),
    "dtype other than the values": (bent_metadata(*FC, "dtype", to="I32"), "is torch.float32"),
    "packing other": (bent_metadata(*FC, "packing", to="bitmask"), "needed packing 'indices'"),
    "packing a list": (bent_metadata(*FC, "packing", to=["indices"]), "needed packing 'indices'"),
    "axis null": (bent_metadata(*FC, "axis", to=None), "needed exactly the fields"),
    "axis text": (bent_metadata(*FC, "axis", to="input"), "needed exactly the fields"),
    "axis beyond": (bent_metadata(*FC, "axis", "dim", to=2), "does not fit"),
    "axis negative": (bent_metadata(*FC, "axis", "dim", to=-1), "does not fit"),
    "axis fraction": (bent_metadata(*FC, "axis", "dim", to=1.0), "not made of integers"),
    "axis boolean": (bent_metadata(*FC, "axis", "dim", to=True), "not made of integers"),
    "blocks 0": (bent_metadata(*FC, "axis", "blocks", to=0), "does not fit"),
    "blocks negative": (bent_metadata(*FC, "axis", "blocks", to=-2), "does not fit"),
    "blocks that do not divide": (bent_metadata(*FC, "axis", "blocks", to=3), "does not fit"),
    "blocks huge": (bent_metadata(*FC, "axis", "blocks", to=10**30), "does not fit"),
    "blocks with another shape of values": (bent_metadata(*FC, "axis", "blocks", to=2), r"needed .* \(2, 2, 2\)"),
    "axis of other values": (bent_metadata(*FC, "axis", "dim", to=0), "needed torch.float32"),
    "shape other": (bent_metadata(*FC, "shape", to=[2, 9]), r"needed torch.float32 \(2, 6\)"),
    "shape flat": (bent_metadata(*FC, "shape", to=[16]), "does not fit"),
    "shape empty": (bent_metadata(*FC, "shape", to=[]), "a scalar"),
    "shape of zeros": (bent_metadata(*FC, "shape", to=[0, 8]), "an empty weight"),
    "shape negative": (bent_metadata(*FC, "shape", to=[-2, -8]), "not a short list of lengths"),
    "shape text": (bent_metadata(*FC, "shape", to="2,8"), "not a short list of lengths"),
    "shape booleans": (bent_metadata(*FC, "shape", to=[True, 8]), "not a short list of lengths"),
    "shape overflows": (bent_metadata(*FC, "shape", to=[2**32, 2**32]), "not a short list of lengths"),
    "a million dims": (bent_metadata(*FC, "shape", to=[1] * 1_000_000), "JSON of about 1000024 values; the limit is"),
    "a thousand dims": (bent_metadata(*FC, "shape", to=[1] * 1_000), "not a short list of lengths"),
    "10^9 weights": (huge("1:64", [1, 10**9]), "needed torch.float32"),
    "10^9 rows": (huge("1:64", [10**9, 1]), "needed torch.float32"),
    "10^18 weights": (huge("1:64", [10**9, 10**9]), "needed torch.float32"),
    "values missing": (bent_metadata("sparse", "gone", to=METADATA["sparse"]["fc.weight"]), "'gone.values' is missing"),
    "weight also dense": (
        file(*header_and_data({**TENSORS, "fc.weight": ("U8", [1], b"x")}, METADATA)),
        "'fc.weight' is given to two",
    ),
    "alias of nothing": (bent_metadata("aliases", to={"a": "b"}), "not in the file"),
    "alias of itself": (bent_metadata("aliases", to={"a": "a"}), "not in the file"),
    "alias of an alias": (bent_metadata("aliases", to={"a": "on", "b": "a"}), "not in the file"),
    "alias of indices": (bent_metadata("aliases", to={"a": "fc.weight.indices"}), "not in the file"),
    "alias over a tensor": (bent_metadata("aliases", to={"on": "fc.bias"}), "'on' is given to two"),
    "alias over a weight": (bent_metadata("aliases", to={"fc.weight": "fc.bias"}), "'fc.weight' is given to two"),
    "alias over values": (bent_metadata("aliases", to={"fc.weight.values": "fc.bias"}), "given to two"),
    "alias of half a surrogate": (bent_metadata("aliases", to={"\ud800": "fc.bias"}), "not valid Unicode"),
}

INDICES = {
    "duplicate": (bent_tensor("fc.weight.indices", content=b"\x4c\x00"), "not ascending"),
    "descending": (bent_tensor("fc.weight.indices", content=b"\x43\x89"), "not ascending"),
    "spare slot elsewhere": (bent_tensor("fc.weight.indices", content=b"\x8c\x89"), "spare slot"),
    "all ones": (bent_tensor("fc.weight.indices", content=b"\xff\xff"), "not ascending"),
    "mask of two": (bent_tensor("conv.weight.indices", content=b"\x0a"), "bitmask"),
    "mask of four": (bent_tensor("conv.weight.indices", content=b"\x4b"), "bitmask"),
    "bit after the end": (bent_tensor("conv.weight.indices", content=b"\xca"), "after the last group"),
    "too few": (bent_tensor("fc.weight.indices", shape=[1], content=b"\x4c"), r"needed torch.uint8 \(2,\)"),
    "too many": (bent_tensor("fc.weight.indices", shape=[3], content=b"\x4c\x89\0"), r"needed torch.uint8 \(2,\)"),
    "two dims": (bent_tensor("fc.weight.indices", shape=[2, 1]), r"needed torch.uint8 \(2,\)"),
    "signed": (bent_tensor("fc.weight.indices", dtype="I8"), "is torch.int8"),
    "values flat": (bent_tensor("fc.weight.values", shape=[8]), r"needed torch.float32 \(2, 4\)"),
    "values transposed": (bent_tensor("fc.weight.values", shape=[4, 2]), r"needed torch.float32 \(2, 4\)"),
}
ALL = {
    f"{group}: {name}": attack
    for group, attacks in {
        "container": CONTAINER,
        "pattern": PATTERNS,
        "metadata": METADATA_ATTACKS,
        "indices": INDICES,
    }.items()
    for name, attack in attacks.items()
}
