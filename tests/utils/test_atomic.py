"""Files appear whole, with the mode of any new file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import openwork as ow
from openwork.export import to_huggingface, to_torch_export
from openwork.utils.atomic import atomic_file, usual_modes, write_text


@pytest.fixture(params=[(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=lambda pair: f"umask {pair[0]:03o}")
def usual(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file, under several umasks."""
    umask, mode = request.param
    before = os.umask(umask)
    yield mode
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_writer_with_a_mode_of_its_own_gives_a_file_of_the_usual_mode(tmp_path: Path, usual: int) -> None:
    with atomic_file(tmp_path / "new") as part:
        part.unlink()
        save_file({"x": torch.zeros(1)}, part)
        part.chmod(0o600)
    assert mode(tmp_path / "new") == usual


def test_text(tmp_path: Path, usual: int) -> None:
    write_text(tmp_path / "a.txt", "ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    assert mode(tmp_path / "a.txt") == usual


def test_whatever_saves_and_exports_gives_files_of_the_usual_mode(tmp_path: Path, usual: int) -> None:
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    to_torch_export(model, torch.zeros(1, 8), tmp_path / "net.pt2")
    to_huggingface(model, tmp_path / "folder", pattern="2:4")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: mode(path) for path in files} == {path.name: usual for path in files}
    assert len(files) == 5


def test_files_of_transformers_too(tmp_path: Path, usual: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    ow.project(model, "2:4", exclude=["embeddings"])
    to_huggingface(model, tmp_path, pattern=ow.Selection("2:4", exclude=["embeddings"]))
    assert {path.name: mode(path) for path in tmp_path.iterdir()}["model.safetensors"] == usual


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "half" * 10_000 + "\ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_link_keeps_pointing_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_new_files_that_match_get_the_usual_mode_and_old_ones_keep_theirs(tmp_path: Path, usual: int) -> None:
    old, new, other = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.txt"))
    old.touch()
    old.chmod(0o640)
    with usual_modes(tmp_path, "*.safetensors"):
        for path in (old, new, other):
            path.touch()
            path.chmod(0o400)
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
        old.name: 0o640,
        new.name: usual,
        other.name: 0o400,
    }
