"""Paths that are no plain files, modes, and folders and disks that take no file."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.export import onnx, to_huggingface, to_onnx, to_torch_export
from openwork.files import container
from openwork.files.checkpoint import check, describe
from openwork.utils import atomic
from openwork.utils.atomic import write_text


@pytest.fixture
def model() -> nn.Linear:
    model = nn.Linear(8, 4).eval()
    ow.project(model, "2:4")
    return model


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def special(folder: Path, what: str) -> Iterator[Path]:
    """A path of a kind that is no plain file."""
    path = folder / "special"
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a device":
        path = Path(os.devnull)
    elif what == "a link to a device":
        path.symlink_to(os.devnull)
    elif what == "a link to itself":
        path.symlink_to(path)
    with socket.socket(socket.AF_UNIX) as server:
        if what == "a socket":
            server.bind(os.fspath(path.relative_to(Path.cwd())))
        yield path


SPECIAL = ["a pipe", "a folder", "a device", "a link to a device", "a link to itself", "a socket"]


@pytest.mark.parametrize("what", SPECIAL)
def test_saving_over_it_is_refused_and_leaves_it(tmp_path: Path, model: nn.Linear, what: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with special(tmp_path, what) as path:
        before, listed = path.lstat(), sorted(os.listdir(tmp_path))
        for write in (
            lambda: ow.save(model, path, pattern="2:4"),
            lambda: write_text(path, "text"),
            lambda: to_torch_export(model, torch.ones(1, 8), path),
        ):
            with pytest.raises(OSError, match=what.removeprefix("a link to ") + "|symbolic links") as caught:
                write()
            assert str(path) in str(caught.value)
        after = path.lstat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert sorted(os.listdir(tmp_path)) == listed


@pytest.mark.parametrize("what", [each for each in SPECIAL if each != "a folder"])
def test_reading_it_is_refused_and_waits_for_nobody(
    tmp_path: Path, what: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with special(tmp_path, what) as path:
        for read in (ow.load_state_dict, check, describe, lambda path: ow.load(path, into=nn.Linear(8, 4))):
            with pytest.raises((ValueError, OSError)) as caught:
                read(path)
            assert str(path) in str(caught.value)
        for command in ("inspect", "verify", "plan", "export"):
            assert main([command, str(path), *(["--out", "x.pt2"] if command == "export" else [])]) == 2
            assert str(path) in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_what_stands_for_an_open_pipe_is_refused(model: nn.Linear) -> None:
    reader, writer = os.pipe()
    for number, use in ((writer, lambda path: ow.save(model, path, pattern="2:4")), (reader, ow.load_state_dict)):
        with pytest.raises((OSError, ValueError), match=f"/dev/fd/{number}") as caught:
            use(f"/dev/fd/{number}")
        assert "it is a pipe" in str(caught.value)
        os.close(number)


def test_links_are_followed_and_stay(tmp_path: Path, model: nn.Linear) -> None:
    (tmp_path / "real").mkdir()
    link, far, target = tmp_path / "link", tmp_path / "far", tmp_path / "real" / "net"
    far.symlink_to(link)
    link.symlink_to("real/net")
    for _ in range(2):  # to nothing yet, then to a file
        ow.save(model, far, pattern="2:4")
        assert (far.is_symlink(), link.is_symlink(), target.is_symlink()) == (True, True, False)
        check(far)
    link.unlink()
    link.symlink_to("gone/net")
    with pytest.raises(FileNotFoundError, match=r"there is no such folder.*gone"):
        ow.save(model, far, pattern="2:4")


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_replaced_gives_its_mode(tmp_path: Path, model: nn.Linear, before: int) -> None:
    x, files = torch.ones(1, 8), [tmp_path / name for name in ("a.safetensors", "b.pt2", "c.txt")]
    folder = tmp_path / "folder"
    to_huggingface(model, folder, pattern="2:4")
    files += folder.iterdir()
    for file in files:
        file.touch()
        file.chmod(before)
    seen = []
    real = atomic.sync

    def sync(part: Path) -> None:
        seen.append(mode(part))
        real(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "sync", sync)
        ow.save(model, files[0], pattern="2:4")
        to_torch_export(model, x, files[1])
        write_text(files[2], "text")
        to_huggingface(model, folder, pattern="2:4")
    assert [mode(file) for file in files] == [before] * len(files)
    assert len(seen) >= len(files)


def test_what_is_secret_is_secret_while_it_is_written(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, real = tmp_path / "net", [], container._put
    path.touch()
    path.chmod(0o600)

    def put(*args: Any) -> int:
        seen.extend(mode(part) for part in tmp_path.glob(".*.part"))
        return real(*args)

    monkeypatch.setattr(container, "_put", put)
    ow.save(model, path, pattern="2:4")
    assert set(seen) == {0o600}


def test_onnx_files_keep_their_mode(tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "net.onnx"
    path.touch()
    path.chmod(0o600)
    monkeypatch.setattr(onnx, "_PROTOBUF_LIMIT", 1)  # the weights in a second file
    to_onnx(model, torch.ones(1, 8), path, pattern="2:4")
    assert [mode(file) for file in tmp_path.iterdir()] == [0o600, 0o600]


def test_folders_that_are_not_there_and_names_that_are_none(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no such folder.*missing"):
        ow.save(model, tmp_path / "missing" / "net", pattern="2:4")
    with pytest.raises(IsADirectoryError, match="slash"):
        ow.save(model, f"{tmp_path}/net/", pattern="2:4")
    with pytest.raises(OSError, match="net"):
        ow.save(model, tmp_path / ("net" * 200), pattern="2:4")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="an empty one"):
        ow.save(model, "", pattern="2:4")
    assert not list(tmp_path.iterdir())


def test_paths_of_every_type(tmp_path: Path, model: nn.Linear) -> None:
    for path in (tmp_path / "a", os.fspath(tmp_path / "b"), os.fsencode(tmp_path / "c")):
        ow.save(model, path, pattern="2:4")
        assert torch.equal(ow.load(path, into=nn.Linear(8, 4)).weight, model.weight)


@pytest.mark.parametrize("call", ["write", "truncate", "fsync", "replace", "open"])
@pytest.mark.parametrize("number", [28, 30, 13])  # disk full, read-only, permission
def test_a_disk_that_takes_nothing_is_named_by_the_path(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "net"
    path.write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    if call in ("write", "truncate"):
        monkeypatch.setattr(container, "_put", fail)
    else:
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, **o: real(*a, **o) if a[0] == tmp_path else fail())
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        ow.save(model, path, pattern="2:4")
    monkeypatch.undo()
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["net"]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path, model = tmp_path / "net", nn.Linear(64, 64)
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # no file may become longer
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            ow.save(model, path, pattern="4:4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path, model: nn.Linear) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as caught:
        ow.save(model, tmp_path / "net", pattern="2:4")
    assert caught.value.filename == str(tmp_path / "net")


@pytest.mark.parametrize("typo", ["runs/modle", "runs/model.safetenors", "modle", "runs/../modle", "./runs/modle"])
def test_a_mistyped_path_asks_nobody(tmp_path: Path, typo: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(socket, "socket", None)
    for read in (ow.load_state_dict, check, describe, lambda path: ow.load(path, into=nn.Linear(8, 4))):
        with pytest.raises(FileNotFoundError, match=f"No such file or directory.*{typo}"):
            read(typo)
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        ow.load_deployed(typo, nn.Linear(8, 4), torch.ones(1, 8))
    hint = (
        f"; a repository of the Hugging Face Hub is named hf://{typo}"
        if typo[:5] == "runs/" and ".." not in typo
        else ""
    )
    for command in ("inspect", "verify"):
        assert main([command, typo]) == 2
        assert f"No such file or directory{hint}: '{typo}'" in capsys.readouterr().err
