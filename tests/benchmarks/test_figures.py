"""Figures of the documentation are readable in the light and in the dark."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import figures  # noqa: E402

DRAWN = [path for path in sorted((ROOT / "docs").glob("*.svg")) if "Matplotlib" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_every_colour_has_one_for_dark_pages(path):
    text = path.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text, f"python benchmarks/figures.py docs/{path.name}"
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})[;\"]", text))
    assert used <= figures._IN_DARK.keys()


def test_a_figure_is_saved_with_both_and_the_same_each_time(tmp_path):
    drawing = pytest.importorskip("matplotlib.figure")
    texts = []
    for name in ("a.svg", "b.svg"):
        figure = drawing.Figure(figsize=(2, 1))
        figure.subplots().plot([1, 2], label="line")
        figures.save(figure, tmp_path / name)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1] == figures.with_dark(texts[0])
    assert '[style*="stroke: #1f77b4"] {stroke: #6cb2eb !important}' in texts[0]
