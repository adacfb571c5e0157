"""benchmarks/mask_changes.py: which runs count, and what the correlation and its interval are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import mask_changes as changes


def document(higher: bool = True) -> dict:
    metric = {"key": "score", "label": "score", "unit": "", "scale": 100, "digits": 2, "higher_is_better": higher}
    run = {"pattern": "2:4", "density": 0.5, "seconds": 3.0, "sad_start": 0.2, "flip_rate": 0.001}
    return {
        "metrics": [metric],
        "config": {"task": "classification"},
        "runs": [
            run | {"method": "dense", "seed": 0, "score": 0.8},
            run | {"method": "dense", "seed": 1, "score": 0.9},
            run | {"method": "sr-ste", "seed": 0, "decay": 0.02, "score": 0.7},
            run | {"method": "sr-ste", "seed": 1, "decay": 0.02, "score": 0.95},
            run | {"method": "asp", "seed": 1, "score": 0.95, "flip_rate": 0.0},
            run | {"method": "ste", "seed": 1, "score": None},
            run | {"method": "ste", "seed": 2, "score": 0.9},
        ],
    }


@pytest.mark.parametrize("higher", [True, False])
def test_a_run_counts_where_its_mask_moves_and_its_seed_has_a_dense_run(higher):
    runs = changes.runs_of(document(higher))
    assert [run.choice for run in runs] == ["sr-ste decay=0.02"] * 2
    assert [run.gain for run in runs] == pytest.approx([-10, 5] if higher else [10, -5])
    assert runs[0].change == pytest.approx({"sad_start": 20, "flip_rate": 0.1})
    assert runs[0].panel == "classification, 2:4"


def test_the_correlation_is_spearmans():
    draw = np.random.default_rng(3)
    x, y = draw.integers(5, size=(2, 40))  # with ties
    assert changes.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(changes.spearman(x, np.ones(40)))


def test_the_interval_draws_choices_not_runs():
    """Twenty seeds of two choices are two points: the interval is as wide as two points leave it."""
    draw = np.random.default_rng(0)
    of = {"a": 1.0, "b": 3.0}
    runs = [
        changes.Run("p", name, {"sad_start": value + draw.normal(), "flip_rate": value}, value + draw.normal())
        for name, value in of.items()
        for _ in range(20)
    ]
    whole, low, high = changes.interval(runs, "sad_start", draws=200)
    assert whole > 0.4
    assert low < 0.2 < whole <= high  # of one choice alone nothing is left but noise
