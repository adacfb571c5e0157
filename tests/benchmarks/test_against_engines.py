"""docs/performance.md holds the tables that benchmarks/against_engines.py makes of the stored rows."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from openwork.bench.measure import BenchRow
from openwork.bench.measure import rows as bench_rows

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("against_engines", ROOT / "benchmarks" / "against_engines.py")
against_engines = importlib.util.module_from_spec(SPEC)
sys.modules["against_engines"] = against_engines  # dataclasses look their module up
SPEC.loader.exec_module(against_engines)


@pytest.mark.parametrize("page", against_engines.PAGES, ids=lambda page: page.name)
def test_tables_are_made_not_typed(page):
    text = page.read_text(encoding="utf-8")
    assert against_engines.with_tables(text) == text


def test_the_page_has_one_table_and_fits_a_screen():
    text = against_engines.PAGES[0].read_text(encoding="utf-8")
    assert text.count("<!-- engines ") == 1
    assert text.count("![") <= 2
    assert len(text.splitlines()) <= 50


def row(**fields):
    given = {"op": "bert", "shape": "batch 1", "threads": "1", "dtype": "float32", "pattern": "dense"}
    given |= {"impl": "dense OpenVINO", "baseline": "dense OpenVINO", "baseline_p50_us": "8000", "ratio": "1"}
    given |= {"ratio_p20": "nan", "ratio_p80": "nan", "machine": "a machine", "isa": "avx2"}
    return given | {"engine": "OpenVINO 1", "torch": "2", "date": "2026-01-01"} | fields


def test_a_line_has_the_faster_way_of_each_pattern():
    ours = {"engine": "openwork 3", "date": "2026-01-02"}
    rows = [
        row(),
        row(**ours, pattern="2:4", impl="deployed 2:4 float32", ratio="1.2", ratio_p20="1.1", ratio_p80="1.35"),
        row(**ours, pattern="2:4", impl="deployed 2:4 float32 compiled", ratio="1.1"),
        row(
            op="mine:net", threads="2", baseline="dense eager", pattern="1:8", impl="deployed 1:8 compiled", ratio="0.5"
        ),
    ]
    assert against_engines.table(rows).splitlines() == [
        "| network | batch, threads | precision | fastest dense | 2:4 | 1:8 |",
        "|---|---|---|---|---|---|",
        "| 6 layers of BERT-base, 128 tokens | 1, 1 | float32 | 8.0 ms, OpenVINO | 1.20 [1.10, 1.35] |  |",
        "| mine:net | 1, 2 | float32 | 8.0 ms, eager |  | 0.50 c |",
        "",
        "a machine, avx2; OpenVINO 1, openwork 3, torch 2; 2026-01-01 to 2026-01-02.",
    ]


def test_which_processors_multiply_bfloat16(tmp_path):
    (tmp_path / "cpuinfo").write_text("flags : avx512_vnni avx512_bf16 f16c")
    assert against_engines.multiplies_bfloat16(tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx512_vnni f16c")
    assert not against_engines.multiplies_bfloat16(tmp_path / "cpuinfo")
    assert against_engines.multiplies_bfloat16(tmp_path / "none")


def test_what_is_run_is_kept_row_by_row(monkeypatch, tmp_path, capsys):
    ran = []

    def openwork(words):
        ran.append(words)
        if "resnet50" in words:
            return 2
        found = bench_rows(words[1], "batch 1", {"dense eager": [1.0]}, ["dense eager"], {}, {})
        with open(words[words.index("--out") + 1], "w", newline="") as file:
            writer = csv.DictWriter(file, [*BenchRow.__dataclass_fields__])
            writer.writeheader()
            writer.writerows(vars(each) for each in found)
        return 0

    monkeypatch.setattr(against_engines, "openwork", openwork)
    monkeypatch.setattr(against_engines, "RESULTS", tmp_path)
    monkeypatch.setattr(against_engines, "multiplies_bfloat16", lambda: True)
    against_engines.run("here", 1.0)
    kept = list(csv.DictReader((tmp_path / "engines-here.csv").open(newline="")))
    assert [row["op"] for row in kept] == [row.network for row in against_engines.ROWS if row.network != "resnet50"]
    assert len(ran) == len(against_engines.ROWS) == 10
    against_engines.run("late", -1.0)
    assert len(ran) == 10
    assert capsys.readouterr().out.count("left out after 0 minutes: Row(network=") == 10
    monkeypatch.setattr(against_engines, "multiplies_bfloat16", lambda: False)
    against_engines.run("old", 1.0)
    assert len(ran) == 18
    assert capsys.readouterr().out.count("does not multiply bfloat16: Row(network=") == 2
    page = "<!-- engines here -->\nold\n<!-- end -->\n<!-- engines nowhere -->\n\n<!-- gpu masks -->\n\n<!-- end -->"
    with pytest.raises(FileNotFoundError, match="engines-nowhere"):
        against_engines.with_tables(page)
    assert "| mine" not in against_engines.with_tables(page.partition("<!-- engines nowhere")[0])
