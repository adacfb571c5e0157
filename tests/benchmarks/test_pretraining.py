"""benchmarks/pretraining.py: every method from the same start, a tenth of the text held out; and the table of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import pretraining  # noqa: E402


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(97, 123)) * 20)
    return path


def run(text: Path, *words: str) -> dict[str, Any]:
    out = text.with_suffix(".json")
    assert pretraining.main(["--text", str(text), "--size", "tiny", "--out", str(out), *words]) == 0
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def test_every_method_learns_from_the_same_start(text: Path, capsys: Any) -> None:
    words = ("--steps", "60", "--lr", "0.01", "--refresh_every", "7", "--seeds", "0")
    document = run(text, *words, "--methods", "dense", "SR-STE", "transposable")
    runs = {each["method"]: each for each in document["runs"]}
    assert list(runs) == ["dense", "SR-STE", "transposable"]
    assert document["recipe"] == {"size": "tiny", "steps": 60, "lr": 0.01, "decay": 2e-4, "refresh_every": 7}
    for each in runs.values():
        assert len(each["loss"]) == 60
        assert [step for step, _ in each["held_out"]] == list(range(6, 61, 6))
        assert each["final"] == pytest.approx(each["held_out"][-1][1], rel=1e-4)  # finalized it computes the same
        assert each["final"] < each["loss"][0] - 0.5
    assert runs["SR-STE"]["sad"] > 0
    assert runs["transposable"]["sad"] > 0
    assert "sad" not in runs["dense"]
    assert "seed 0, transposable: held-out loss" in capsys.readouterr().out
    again = run(text, *words, "--methods", "SR-STE")
    assert again["runs"][0]["loss"] == runs["SR-STE"]["loss"]


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    text = pretraining.Text(path, pretraining.SIZES["tiny"])
    assert all(set(windows.flatten().tolist()) == {ord("a")} for windows in text.batches(200, seed=0))
    held = torch.cat(list(text.held_out()))
    assert held.shape == (6, 17)
    assert set(held.flatten().tolist()) == {ord("b")}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "--text FILE is needed, or --page JSON"),
        (["--text", "SHORT", "--size", "tiny"], "has 50 bytes; needed more"),
    ],
)
def test_what_it_cannot_do_is_refused(words: list[str], complaint: str, tmp_path: Path, capsys: Any) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x" * 50)
    with pytest.raises(SystemExit) as stopped:
        pretraining.main([str(short) if word == "SHORT" else word for word in words])
    assert complaint in capsys.readouterr().err + str(stopped.value)


def document(**finals: tuple[float, ...]) -> dict[str, Any]:
    runs = [
        {"method": how, "seed": seed, "final": final, "held_out": [[1, final]], "sad": 0.125}
        for how, each in finals.items()
        for seed, final in enumerate(each)
    ]
    for each in runs:
        if each["method"] == "dense":
            del each["sad"]
    recipe = {"size": "small", "steps": 9, "lr": 1e-3, "decay": 2e-4, "refresh_every": 40}
    return {"recipe": recipe, "machine": {"device": "D", "torch": "2"}, "date": "today", "runs": runs}


def test_the_table_pairs_seeds() -> None:
    lines = pretraining.table(document(dense=(1.5, 1.25), transposable=(1.75, 1.25))).splitlines()
    assert lines[2] == "| dense | 1.375 ± 0.177 | - | - |"
    assert lines[3] == "| transposable | 1.500 ± 0.354 | +0.250 +0.000 | 12.5 |"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_page_gets_table_and_chart(tmp_path: Path) -> None:
    page, source = tmp_path / "page.md", tmp_path / "runs.json"
    page.write_text("before\n<!-- pretraining small -->\nold\n<!-- end -->\nafter\n")
    source.write_text(json.dumps(document(dense=(1.5,))))
    pretraining.write_page(source, page)
    assert "old" not in page.read_text()
    assert "| dense | 1.500 | - | - |" in page.read_text()
    assert (
        "D, torch 2, today. 9 steps, learning rate 0.001, decay 0.0002, transposable masks every 40 steps; seeds 0."
        in page.read_text()
    )
    assert (tmp_path / "pretraining-small.svg").read_text().count("<svg") == 1
