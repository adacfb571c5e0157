"""benchmarks/gpu.py where there is no GPU: its arguments, its error, its tables, and a rehearsal of every section."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openwork.bench import command

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_tables  # noqa: E402


def test_without_a_gpu_it_says_so(capsys: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["masks", "--out", str(tmp_path / "gpu")]) == 2
    assert f"no CUDA GPU: torch {torch.__version__} sees none; --rehearse and --tables" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_section_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["mask"])
    assert "no section 'mask'; there are check, masks" in capsys.readouterr().err


def test_a_plan_for_a_gpu_needs_one(capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        command.plan(["encoder", "--device", "cuda"])
    assert f"--device cuda: torch {torch.__version__} sees no GPU here" in capsys.readouterr().err


def test_it_is_a_script() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--help"]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=True, cwd=ROOT, env=here)
    assert "masks, lists, linear, decode, training, models" in done.stdout


def test_a_rehearsal_runs_every_section_and_fills_every_table(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    small = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    monkeypatch.setattr(gpu, "resnet", lambda: nn.Sequential(*copy.deepcopy(small)))
    out = ["--out", str(tmp_path / "gpu")]
    assert gpu.main(["--rehearse", *out]) == 0
    assert "checks passed on rehearsal on a CPU" in capsys.readouterr().out
    with (tmp_path / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["section"] for row in rows} == set(gpu.SECTIONS) - {"check"}
    assert [row["impl"] for row in rows] == [row["impl"] for row in json.loads((tmp_path / "gpu.json").read_text())]
    page = tmp_path / "performance.md"
    page.write_text(gpu_tables.PAGE.read_text())
    assert gpu.main(["--tables", str(tmp_path / "gpu.csv"), "--page", str(page)]) == 0
    for name, made in gpu_tables.TABLES.items():
        part = page.read_text().split(f"<!-- gpu {name} -->")[1].split("<!-- end -->")[0]
        assert made([row for row in rows if row["section"] == name]) in part
        assert gpu_tables.NONE not in part


def row(**fields: Any) -> dict[str, str]:
    given = {"section": "masks", "shape": "8192x8192", "pattern": "2:4", "dtype": "bfloat16", "note": "", "share": 0.0}
    given |= {"p20_us": 9.0, "p50_us": 10.0, "p80_us": 12.0, "baseline": "copy", "ratio": 1.0}
    return {name: str(value) for name, value in {**given, **fields}.items()}


def test_tables_say_what_was_measured() -> None:
    shares = {"copy": 1.0, "prune": 0.91, "mask": 0.83, "SR-STE term": 0.874, "reference": ""}
    rows = [row(impl=name, share=share, note="4000 GB/s" if name == "copy" else "") for name, share in shares.items()]
    rows[-1]["p50_us"] = "455"
    assert gpu_tables.masks(rows).splitlines()[2] == "| 2:4 | bfloat16 | 4000 GB/s | 0.91 | 0.83 | 0.87 | 46 |"
    step = row(section="training", shape="gpt2", impl="SR-STE", ratio=0.98)
    assert gpu_tables.training([step]).splitlines()[2] == "| gpt2 | SR-STE | 10.0 [9.0, 12.0] | 1.020 |"
    assert "x1.00 of copy  91% of copy" in gpu_tables.line(rows[1])


def test_a_page_without_the_place_is_refused(tmp_path: Path) -> None:
    file, page = tmp_path / "gpu.csv", tmp_path / "page.md"
    file.write_text("section,gpu,versions,date,shape,impl,p20_us,p50_us,p80_us,ratio\ntraining,g,v,d,s,i,1,1,1,1\n")
    page.write_text("<!-- gpu masks -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="has no line <!-- gpu training -->"):
        gpu_tables.write(file, page)


def test_shapes_of_resnet50() -> None:
    shapes = gpu.resnet50_shapes()
    assert len(shapes) == 53
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_493_504  # 25.5 M less the stem and what has one dim
