"""benchmarks/protocol.py: every stage is a comparison that `openwork compare` accepts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from openwork.recipes import find
from openwork.recipes.compare import half_runs, planned_runs
from openwork.recipes.config import comparison
from openwork.recipes.parser import parse

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import protocol


def rows_of(folder, planned):
    """What a comparison leaves, its best options being the last ones tried."""
    metric = {"key": "k", "label": "", "unit": "", "scale": 1, "digits": 1, "higher_is_better": True}
    rows = [
        {"method": run.method, "pattern": run.pattern, "options": run.method_options, "scores": {"k": i}}
        for i, run in enumerate(planned)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"metrics": [metric], "rows": rows}))


def test_every_stage_plans_runs_of_one_length(tmp_path):
    for task, each in protocol.PROTOCOLS.items():
        finals = {}
        for stage in protocol.STAGES:
            for folder, arguments in each.commands(stage):
                words = protocol.words_of(task, folder, arguments, find(task).config().data, tmp_path)
                config = parse(comparison(find(task).config), words[2:], "compare", "")
                runs = planned_runs(config)
                rows_of(tmp_path / folder, runs)
                if folder == "final":
                    finals |= {run.out: run for run in [*runs, *half_runs(config, runs)]}
                if stage in ("choose", "knobs"):
                    assert {run.seed for run in runs} == {9}
        assert {run.seed for run in finals.values()} == set(map(int, each.seeds.split()))
        for run in finals.values():
            is_half = "-half-" in run.out or "/half/" in run.out  # ASP in an equal budget, and what it starts from
            assert run.epochs == (each.epochs // 2 if is_half else each.epochs)
        tuned = {run.method for run in finals.values() if run.method_options}
        assert {"sr-ste", *each.methods.split()} - {"s-ste"} <= tuned


def test_an_unknown_stage_is_named(capsys):
    with pytest.raises(SystemExit):
        protocol.main(["classification", "chose", "--data", "digits"])
    assert "no stage chose; there are choose, compare," in capsys.readouterr().err
