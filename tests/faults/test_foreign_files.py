"""Files of other programs where a safetensors file is needed: the error says what they are and what to do."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.export import to_torch_export
from openwork.export.check import check_onnx
from openwork.files.checkpoint import check, describe
from openwork.recipes.weights import load_weights


def written(write: Callable[..., object], *args: object, **options: object) -> bytes:
    file = io.BytesIO()
    write(*args, file, **options)
    return file.getvalue()


def torch_saved(**options: object) -> bytes:
    return written(lambda file: torch.save(nn.Linear(8, 4).state_dict(), file, **options))


def scripted() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written(lambda file: torch.jit.save(torch.jit.script(nn.Linear(8, 4)), file))


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return file.getvalue()


# ir_version 10, then the name of the producer: the first fields of a ModelProto.
ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x052.9.1" + bytes(100)
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}

FOREIGN: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "pytorch_model.bin": (torch_saved, "a checkpoint of torch.save, which is a pickle", "torch.load"),
    "old.pt": (lambda: torch_saved(_use_new_zipfile_serialization=False), "a pickle", "torch.load"),
    "object.pkl": (lambda: pickle.dumps({"a": [1.0] * 99}), "a pickle", "torch.load"),
    "cut.pt": (lambda: torch_saved()[:300], "a zip archive, .* cut short", "fetch it again"),
    "script.pt": (scripted, "a TorchScript model", "torch.jit.load"),
    "net.npz": (
        lambda: written(lambda file: np.savez(file, a=np.ones(3))),
        r"an archive of NumPy \(.npz\)",
        "numpy.load",
    ),
    "net.npy": (lambda: written(lambda file: np.save(file, np.ones(3))), "an array of NumPy", "numpy.load"),
    "net.keras": (lambda: zipped("config.json", "model.weights.h5"), "a model of Keras", "ow.save"),
    "net.zip": (lambda: zipped("a.safetensors"), "a zip archive with a.safetensors", "unpack"),
    "net.gz": (lambda: gzip.compress(b"content"), "a gzip archive", "unpack"),
    "net.tar": (tarred, "a tar archive", "unpack"),
    "net.onnx": (lambda: ONNX, "an ONNX model", "openwork verify"),
    "net.gguf": (lambda: b"GGUF\3\0\0\0" + bytes(64), "a GGUF", "ow.save"),
    "net.h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file", "ow.save"),
    "net.tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(64), "a model of TensorFlow Lite", "ow.save"),
    "net.xml": (lambda: b'<?xml version="1.0"?><net/>', "an XML file.*OpenVINO", "ow.save"),
    "pointer.safetensors": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "page.safetensors": (lambda: b"\n<!DOCTYPE html><html>404</html>", "a page in HTML", "fetch it again"),
    "page2.safetensors": (lambda: b"<HTML><body>log in</body>", "a page in HTML", "fetch it again"),
    "error.safetensors": (lambda: b'{"error": "not found"}', "a JSON file that begins .*not found", "name the weights"),
    "config.json": (lambda: json.dumps({"a": 1}).encode(), "a JSON file", "the folder"),
    "model.safetensors.index.json": (
        lambda: json.dumps(INDEX).encode(),
        "the index of a model in several files",
        "name the folder",
    ),
    "long.index.json": (
        lambda: json.dumps({"metadata": {"total_size": 8, "note": "x" * 999}, "weight_map": {}}, indent=2).encode(),
        "the index of a model in several files",
        "name the folder",
    ),
    "notes.md": (lambda: "# Wörter\n".encode() * 100, "a text file that begins with '# Wörter", "fetch it again"),
    "empty.safetensors": (lambda: b"", "empty", "fetch it again"),
    "zeros.safetensors": (lambda: bytes(4096), "nothing but zeros", "fetch it again"),
    "cut.safetensors": (
        lambda: (5000).to_bytes(8, "little") + b'{"a":{"dtype"',
        "the header: it should take 5000 bytes, the file has 21: cut short",
        "fetch it again",
    ),
    "noise.safetensors": (lambda: bytes(range(200, 256)) * 9, "of no format that is known here", "safetensors"),
}


@pytest.fixture(params=FOREIGN)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    make, what, to_do = FOREIGN[request.param]
    path = tmp_path / request.param
    path.write_bytes(make())
    return path, what, to_do


def test_it_is_named_with_what_to_do(foreign: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, what, to_do = foreign
    model = nn.Linear(8, 4)
    for read in (
        ow.load_state_dict,
        check,
        describe,
        lambda path: ow.load(path, into=model),
        lambda path: ow.load_deployed(path, model, torch.ones(1, 8)),
        lambda path: load_weights(model, path),
    ):
        with pytest.raises(ValueError, match=f"(?s){what}.*{to_do}") as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value)) < len(str(path)) + 300
    out = str(path.with_name("out.safetensors"))
    for words in (["inspect"], ["verify"], ["plan"], ["export", "--out", out], ["bench"]):
        if words[0] != "verify" or path.suffix != ".onnx":
            assert main([words[0], str(path), *words[1:]]) == 2
            error = capsys.readouterr().err
            assert str(path) in error
            assert to_do in error
    assert not Path(out).exists()


@pytest.mark.parametrize("name", [name for name in FOREIGN if name not in ("net.onnx", "noise.safetensors")])
def test_it_is_named_where_onnx_is_needed(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnx_ir")
    make, what, _ = FOREIGN[name]
    path = tmp_path / "net.onnx"
    path.write_bytes(make())
    if name != "cut.safetensors":
        with pytest.raises(ValueError, match=f"net.onnx is no valid ONNX file: it is {what}"):
            check_onnx(path)


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    to_torch_export(nn.Linear(8, 4).eval(), torch.ones(1, 8), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=r"a program of torch\.export or AOTInductor.*torch\.export\.load"):
        ow.load_state_dict(tmp_path / "net.pt2")


def test_an_ordinary_safetensors_file_and_a_folder_that_lacks_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(nn.Linear(8, 4).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"not written by ow\.save; safetensors\.torch\.load_file reads"):
        ow.load_state_dict(tmp_path / "net.safetensors")
    os.remove(tmp_path / "net.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    assert main(["verify", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "index.json lists model-00001-of-00002.safetensors (1 in all), which the folder lacks" in error
