"""The examples that load the trained networks of models/ show what they say."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
ROOT = Path(__file__).parent.parent
DATA = os.environ.get("OPENWORK_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="OPENWORK_DATA, the folder of test data, is not set")


def run(name: str, monkeypatch, capsys, *words: object) -> str:
    """What a script prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.strip()


def test_translate(monkeypatch, capsys):
    said = run("translate", monkeypatch, capsys, "Tom is my friend.", "Where are you?")
    assert said.splitlines() == ["Tom is my friend.  ->  Tom ist mein Freund.", "Where are you?  ->  Wo sind Sie?"]


@needs_data
def test_classify(monkeypatch, capsys, tmp_path):
    from PIL import Image

    out = tmp_path / "sheet.png"
    said = run("classify", monkeypatch, capsys, f"fashion-mnist={DATA}/fashion-mnist", "--out", out)
    assert said.startswith(f"{out}: 2")
    assert said.endswith("of 32 answers are right, the others are red")
    assert Image.open(out).size == (8 * 84, 4 * 98)


@needs_data
def test_detect(monkeypatch, capsys, tmp_path):
    import numpy as np
    from PIL import Image

    photo, out = sorted(Path(DATA, "bccd").rglob("*.jpg"))[0], tmp_path / "boxes.png"
    said = run("detect", monkeypatch, capsys, photo, "--out", out)
    assert "RBC" in said
    given, drawn = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (photo, out))
    assert given.shape == drawn.shape
    changed = (given != drawn).any(2).mean()
    assert 0.005 < changed < 0.2  # lines of boxes and their names, and no more
