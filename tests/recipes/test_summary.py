import pytest

from openwork.recipes.summary import fitted, flip_rates, meanings, notes, paired_p, summary_rows, table_of
from openwork.recipes.task import description_of, percent

METRICS = [percent("val_accuracy", "accuracy")]


def result(method, seed, accuracy, pattern="2:4", decay=2e-4):
    config = {"method": method, "pattern": pattern, "seed": seed, "epochs": 5}
    config |= {"decay": decay} if method == "sr-ste" else {}
    numbers = {"density": 1.0 if method == "dense" else 0.5, "macs": 10**6, "sad_start": 0.25, "flip_rate": 0.002}
    times = {"seconds_per_step": 0.01 * (seed + 1), "seconds": 3.0, "steps": 300}
    return {"config": config, "val_accuracy": accuracy, "metrics": description_of(METRICS), **times, **numbers}


DENSE = [result("dense", seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.94))]
SPARSE = [result("sr-ste", seed, accuracy) for seed, accuracy in enumerate((0.89, 0.92, 0.92))]


def test_the_flip_rate_is_that_of_one_step_also_where_masks_change_at_once():
    """Chosen anew every 40 steps and recorded every 20: half of the records see all changes, the others none."""
    changes = [0, 40, 0, 20]
    records = [
        {"step": 20 * (i + 1), "weights": 1000, "sad_step": change, "sad_last": change}
        for i, change in enumerate(changes)
    ]
    assert flip_rates(records, 0) == [0.0, 0.04, 0.0, 0.02]
    assert flip_rates(records, 40) == pytest.approx([0.0, 0.002, 0.0, 0.001])
    assert flip_rates([], 40) == []


def test_rows_pair_seeds_with_dense():
    dense, sparse = summary_rows(DENSE + SPARSE)
    assert dense.scores["val_accuracy"] == pytest.approx(0.92)
    assert dense.std == pytest.approx(0.02)
    assert (dense.delta, dense.p) == (None, None)
    assert sparse.delta == pytest.approx(-0.01)
    assert sparse.seconds_per_step == pytest.approx(0.02)
    # differences -1, 0, -2 points: t = -1 / (1 / sqrt 3) = -sqrt 3, two degrees of freedom
    assert sparse.p == pytest.approx(0.2254, abs=1e-4)


def test_one_seed_has_no_spread_and_says_so():
    row = summary_rows(DENSE[:1])[0]
    assert row.std is None
    header, (cells,) = table_of([row], METRICS)
    assert cells[header.index("accuracy %")] == "90.00 (1 seed)"


def test_two_seeds_have_a_spread_but_no_p_value():
    row = summary_rows(DENSE[:2] + SPARSE[:2])[1]
    assert row.std is not None
    assert row.p is None


def test_equal_differences_have_no_p_value():
    assert paired_p([0.01, 0.01, 0.01]) is None


def test_patterns_and_decays_are_rows_of_their_own_and_asp_costs_two_trainings():
    rows = summary_rows(
        [*DENSE, result("sr-ste", 0, 0.9, "1:4"), result("sr-ste", 0, 0.9, decay=-2e-4), result("asp", 0, 0.9)]
    )
    assert [(r.method, r.pattern, r.options) for r in rows[1:]] == [
        ("sr-ste", "1:4", {"decay": 2e-4}),
        ("sr-ste", "2:4", {"decay": -2e-4}),
        ("asp", "2:4", {}),
    ]
    assert table_of(rows, METRICS)[1][-1][-2:] == ["2 x 300", "2 x 5"]


def test_a_terminal_of_100_columns_has_the_important_ones():
    rows = summary_rows([*DENSE, *SPARSE, *(result("transposable-sr-ste", seed, 0.9) for seed in range(3))])
    header, *lines = fitted(*table_of(rows, METRICS), 100)
    assert max(map(len, (header, *lines))) <= 100
    assert all(name in header for name in ("method", "pattern", "accuracy %", "delta vs dense", "SAD %", "p"))
    assert "ms/step" not in header
    assert "ms/step" in fitted(*table_of(rows, METRICS), 300)[0]


def test_what_columns_mean_is_said_of_columns_that_are_there():
    header, _ = table_of(summary_rows(DENSE), METRICS)
    assert meanings(METRICS).keys() <= {*header}
    assert notes(METRICS)[0] == "accuracy: of the finalized network on the validation samples (higher is better);"
