"""docs/deploy/onnxruntime.md holds the table that is made of the stored rows; a row that fails stops no other."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("onnx")
import onnx_runtime  # noqa: E402
import onnx_runtime_table as page  # noqa: E402
from onnx_runtime_start import bytes_of, first_output, needed  # noqa: E402


def line(way, row=("bert", "2:4", "float32"), **fields):
    given = dict(zip(("network", "pattern", "precision"), row, strict=True))
    given |= {"way": way, "p20_ms": "90", "p50_ms": "100", "p80_ms": "110", "difference": "0"}
    given |= {"ratio_p20": "0.9", "ratio_p50": "1", "ratio_p80": "1.1", "file_bytes": "2000000", "first_s": "1.25"}
    given |= {"threads": "1", "software": "A 1", "note": "", "machine": "a machine", "date": "2026-01-01"}
    return given | fields


def test_the_table_is_made_not_typed():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text) == text


def test_a_line_of_the_table():
    lines = [
        line(page.OURS, p50_ms="50.04", ratio_p50="1.96", ratio_p20="1.8", ratio_p80="2.1", software="B 2"),
        line(page.DENSE[0], file_bytes="8000000"),
        line(page.DEPLOYED, first_s="7.5", note="ow.deploy returned dense"),
        line(page.OURS, ("bert", "1:4", "int8")),
    ]
    made = page.table(lines[::-1]).splitlines()
    assert made[2] == (
        "| 6 layers of BERT-base, 128 tokens | float32 | 2:4 | 2.0 MB, 8.0 MB | 1.2 s, 7.5 s | 50.0 "
        "| 100.0 (dense) | 100.0 |  | 1.96 [1.80, 2.10] |"
    )
    assert made[3].startswith("| 6 layers of BERT-base, 128 tokens | int8 | 1:4 | 2.0 MB |")
    assert made[-1] == "a machine, 1 thread; A 1, B 2; 2026-01-01."


def test_rows_are_kept_and_a_failing_one_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_runtime, "RESULTS", tmp_path)
    monkeypatch.setattr(onnx_runtime, "prepare", lambda row, asked: None)
    asked, broken = [], {"resnet50"}

    def measured(row, _):
        asked.append(str(row))
        if row.network in broken:
            raise RuntimeError("no such network")
        yield line(page.OURS, (row.network, row.pattern, row.precision))

    monkeypatch.setattr(onnx_runtime, "measured", measured)
    words = ["run", "--name", "here", "--networks", "bert", "resnet50"]
    onnx_runtime.main(words)
    assert "resnet50 2:4 float32: RuntimeError: no such network" in capsys.readouterr().out
    assert len(asked) == 12
    assert len(list(csv.DictReader((tmp_path / "onnxruntime-here.csv").open()))) == 6
    broken.clear()
    asked.clear()
    onnx_runtime.main([*words, "--minutes", "-1"])
    assert asked == []
    onnx_runtime.main(words)
    assert {name.split()[0] for name in asked} == {"resnet50"}
    assert len(list(csv.DictReader((tmp_path / "onnxruntime-here.csv").open()))) == 12


def test_what_an_installation_holds():
    assert {"onnxruntime", "numpy", "protobuf"} <= needed("onnxruntime")
    assert "torch" not in needed("onnxruntime")
    assert bytes_of("numpy") > 10e6


def test_a_process_that_fails_is_told(capsys):
    assert first_output("it", ["pass"]) > 0
    failed = first_output("it", ["raise SystemExit('no file')"])
    assert failed != failed
    assert "it, first output: ['no file']" in capsys.readouterr().out
