"""JSON that unfolds to much more memory than it takes: refused before it does, or read piece by piece."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.files import header
from openwork.files.header import read_header
from openwork.files.strict_json import Cursor, read_json, strict_json

MIB = 1 << 20
ENTRY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def file(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def metadata(text: str) -> bytes:
    return file(json.dumps({"__metadata__": {"openwork": text}}))


# Each of some 4 MiB, of which Python would make 50 to 200.
LARGE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: file('{"a":[' + "[]," * (MIB * 4 // 3) + "[]]}"),
    "objects": lambda: file('{"a":[' + "{}," * (MIB * 4 // 3) + "{}]}"),
    "numbers": lambda: file('{"a":[' + "1e9," * MIB + "1]}"),
    "deep": lambda: file('{"a":' + "[" * 4 * MIB),
    "deep objects": lambda: file('{"a":' * MIB),
    "a long shape": lambda: file('{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + "999," * MIB + "0]}}"),
    "fields": lambda: file('{"a":{' + ",".join(f'"{i}":{i}' for i in range(MIB // 4)) + "}}"),
    "metadata of lists": lambda: file('{"__metadata__":{"a":[' + "[]," * (MIB * 4 // 3) + "[]]}}"),
    "metadata itself": lambda: file('{"__metadata__":[' + "[]," * (MIB * 4 // 3) + "[]]}"),
    "ours: lists": lambda: metadata('{"version":2,"aliases":{},"sparse":[' + "[]," * (MIB * 4 // 3) + "[]]}"),
    "ours: objects": lambda: metadata('{"version":2,"aliases":{},"sparse":[' + "{}," * (MIB * 4 // 3) + "{}]}"),
    "ours: aliases": lambda: metadata(
        '{"version":1,"sparse":{},"aliases":{' + ",".join(f'"{i}":"a"' for i in range(MIB // 3)) + "}}"
    ),
    "ours: deep": lambda: metadata('{"version":' + "[" * 4 * MIB),
    "a number of a million digits": lambda: file('{"a":' + "9" * 4 * MIB + "}"),
    "a name": lambda: file('{"' + "a" * 4 * MIB + '":1}'),
    "names of nothing": lambda: metadata(json.dumps({"version": 1, "aliases": {"a" * MIB: "b" * MIB}, "sparse": {}})),
    "spaces": lambda: file('{"a":' + " " * 4 * MIB + "}"),
}


@pytest.mark.parametrize("what", LARGE)
def test_it_is_refused_without_the_memory_that_it_wants(tmp_path: Path, what: str) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(LARGE[what]())
    size = path.stat().st_size
    assert size > 1.5 * MIB
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"net\.safetensors: ") as caught:
        ow.load_state_dict(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * size + MIB
    assert len(str(caught.value)) < 2000


def test_the_number_of_tensors_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_MOST_TENSORS", 100)
    path = tmp_path / "net.safetensors"
    path.write_bytes(file("{" + ",".join(f'"{i}":{ENTRY}' for i in range(101)) + "}"))
    with pytest.raises(ValueError, match="the header: it names more than 100 tensors"):
        ow.load_state_dict(path)
    path.write_bytes(file("{" + ",".join(f'"{i}":{ENTRY}' for i in range(100)) + "}"))
    with path.open("rb") as opened:
        assert len(read_header(opened)[1]) == 100
    path.unlink()
    model = nn.Sequential(*(nn.Linear(4, 1) for _ in range(51)))
    with pytest.raises(ValueError, match=r"153 tensors .* at most 100"):
        ow.save(model, path, pattern="4:4")
    assert not path.exists()


def test_models_of_many_tensors_and_many_names_are_read(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(4, 1) for _ in range(600)])
    for i in range(300, 600):
        model[i].bias = model[i % 300].bias
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    state = ow.load_state_dict(tmp_path / "net.safetensors")
    assert len(state) == 1200
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


def test_the_same_json_means_the_same_as_to_python(tmp_path: Path) -> None:
    """In whatever way it is written."""
    name, path = 'ä"\\\n\u2028{}[]:,', tmp_path / "net.safetensors"
    entry = {"shape": [2], "dtype": "U8", "data_offsets": [0, 2]}
    for options in ({}, {"ensure_ascii": False}, {"indent": 3}, {"separators": (" ,\t\r\n", "\n: ")}):
        for order in (1, -1):
            members = [(name, entry), ("__metadata__", {"a": "{", name: ""})][::order]
            text = json.dumps(dict(members), **options)
            raw = text.encode()
            path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"ab")
            with path.open("rb") as opened:
                texts, stored = read_header(opened)
            assert texts == {"a": "{", name: ""}
            assert list(stored) == [name]
            assert (stored[name].shape, stored[name].dtype) == ((2,), torch.uint8)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"a"',
        '{"a":',
        '{"a":1',
        '{"a":1,',
        '{"a":1,}',
        '{,"a":1}',
        '{"a" 1}',
        '{"a":1 "b":2}',
        '{"a":1}}',
        '{"a":1} x',
        "{a:1}",
        "{'a':1}",
        '{"a\n":1}',
        '{"\\x":1}',
        '{"a":01}',
        '{"a":+1}',
        '{"a":[1,]}',
        '{"a":nul}',
        "{1:1}",
        '{"a":1;"b":2}',
        '\ufeff{"a":1}',
        '{"a":1}\x00',
        '{"a":\x0c1}',
    ],
)
def test_what_is_no_json_to_python_is_none_to_the_cursor(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json.loads(text)

    def read() -> None:
        cursor = Cursor(text)
        for _ in cursor.members():
            cursor.value(100)
        cursor.end()

    with pytest.raises((ValueError, TypeError)):
        read()


def test_json_files_beside_a_model_have_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"JSON of about 100000. values; the limit is 250000"):
        strict_json('{"a":[' + "0," * 10**6 + "0]}")
    for name in ("config.json", "model.safetensors.index.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"a":[' + "[]," * 3 * 10**6 + "[]]}")
        with pytest.raises(ValueError, match=f"{name}: JSON of about 6000"):
            read_json(folder / name)
        assert main(["plan" if name == "config.json" else "verify", str(folder)]) == 2
        assert f"{name}: JSON of about" in capsys.readouterr().err
