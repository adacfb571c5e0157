"""A comparison end to end on a slice of the digits, one of its runs begun before, called twice."""

import json
from pathlib import Path

import pytest

from openwork.recipes.classification import ClassificationConfig
from openwork.recipes.compare import compare, half_runs, jobs_of, planned_runs
from openwork.recipes.config import comparison, values_of
from openwork.recipes.rundir import RunDir, read_lines

CompareConfig = comparison(ClassificationConfig)
SMALL = {"limit": 160, "batch_size": 32, "epochs": 2, "topology_every": 2, "seeds": [0], "threads": 2, "jobs": 2}


def names(**fields):
    return [run.out.removeprefix("o/") for run in planned_runs(CompareConfig(out="o", **fields))]


def test_dense_is_trained_once_per_seed_and_seeds_follow_each_other():
    assert names(patterns=["2:4", "1:4"], seeds=[0, 1], methods=["dense", "ste"]) == [
        "dense-seed0",
        "ste-2of4-seed0",
        "ste-1of4-seed0",
        "dense-seed1",
        "ste-2of4-seed1",
        "ste-1of4-seed1",
    ]


def test_each_decay_is_a_run():
    assert names(method_options={"decay": [2e-4, -2e-4]}, seeds=[3], methods=["sr-ste"]) == [
        "sr-ste-2of4-0.0002-seed3",
        "sr-ste-2of4--0.0002-seed3",
    ]


def test_a_run_is_named_after_what_is_switched_on():
    assert names(method_options={"decoupled": [False, True]}, seeds=[3], methods=["sr-ste"]) == [
        "sr-ste-2of4-0.0002-seed3",
        "sr-ste-2of4-0.0002-decoupled-seed3",
    ]


def test_asp_brings_its_dense_run_and_starts_from_it():
    runs = planned_runs(CompareConfig(out="o", methods=["asp"], seeds=[5]))
    assert [run.method for run in runs] == ["dense", "asp"]
    assert runs[1].init == runs[0].out


def test_an_equal_budget_halves_dense_training_and_asp():
    config = CompareConfig(
        out="o", methods=["dense", "asp"], patterns=["2:4", "1:4"], seeds=[5], equal_budget=True, epochs=6, warmup=1,
        schedule="steps", milestones=[2, 4],
    )  # fmt: skip
    runs = planned_runs(config)
    assert [(run.out, run.epochs, run.warmup, run.milestones) for run in runs] == [
        ("o/dense-seed5", 6, 1, [2, 4]),
        ("o/asp-2of4-half-seed5", 3, 0.5, [1, 2]),
        ("o/asp-1of4-half-seed5", 3, 0.5, [1, 2]),
    ]
    (start,) = half_runs(config, runs)
    assert {run.init for run in runs[1:]} == {start.out} == {"o/half/dense-seed5"}
    assert (start.method, start.epochs, start.warmup, start.milestones, start.init) == ("dense", 3, 0.5, [1, 2], "")
    assert start.seed == 5


def test_an_odd_number_of_epochs_has_no_half():
    with pytest.raises(ValueError, match="--equal_budget halves the epochs, and 5 is odd"):
        CompareConfig(epochs=5, equal_budget=True)


def finished(folder, rows, key="val_accuracy", higher=True):
    """A comparison of which only the table is left: (method, pattern, options, score) each."""
    metric = {"key": key, "label": "", "unit": "", "scale": 1, "digits": 1, "higher_is_better": higher}
    rows = [{"method": m, "pattern": p, "options": o, "scores": {key: score}} for m, p, o, score in rows]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"metrics": [metric], "rows": rows}))
    return str(folder)


@pytest.mark.parametrize(("higher", "best"), [(True, 0.2), (False, 0.02)])
def test_each_method_gets_the_options_that_were_best_at_its_pattern(tmp_path, higher, best):
    scores = {0.02: 0.5, 0.2: 0.7, 2.0: None}
    rows = [("sr-ste", "2:4", {"decay": d, "decoupled": False}, score) for d, score in scores.items()]
    first = finished(tmp_path / "a", [*rows, ("dense", "-", {}, 0.9)], higher=higher)
    other = finished(tmp_path / "b", [("mdgf", "2:4", {"steps": 7, "linear": True, "straight_through": False}, 1.0)])
    config = CompareConfig(methods=["ste", "sr-ste", "mdgf"], seeds=[0, 1], options_from=[first, other], out="o")
    options = [(run.method, run.method_options) for run in planned_runs(config)]
    runs = [(method, each.get("decay"), each.get("steps")) for method, each in options]
    assert runs == [("ste", None, None), ("sr-ste", best, None), ("mdgf", None, 7)] * 2


def test_a_schedule_that_was_best_is_found_too(tmp_path):
    rows = [("ste", "2:4", {"mask_schedule": f"ramp={steps}"}, steps / 10) for steps in (2, 5, 3)]
    found = finished(tmp_path / "a", rows)
    (run,) = planned_runs(CompareConfig(methods=["ste"], seeds=[0], options_from=[found], out="o"))
    assert run.method_options == {"mask_schedule": "ramp=5"}


def test_options_that_nobody_looked_for_are_refused(tmp_path):
    folder = finished(tmp_path / "a", [("sr-ste", "2:4", {"decay": 0.5, "decoupled": False}, 0.5)])
    for fields, said in (
        ({"patterns": ["1:4"], "options_from": [folder]}, "no sr-ste 1:4 has a score there; there are sr-ste 2:4"),
        ({"options_from": [str(tmp_path)]}, r"there is no results.json"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            names(methods=["sr-ste"], **fields)
    with pytest.raises(ValueError, match="--options_from and --decay: give one of them"):
        CompareConfig(methods=["sr-ste"], options_from=[folder], method_options={"decay": [0.1]})


def test_jobs_share_the_threads():
    assert {run.threads for run in planned_runs(CompareConfig(threads=8, jobs=4))} == {2}
    assert jobs_of(CompareConfig(jobs=3), 10) == 3


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    config = CompareConfig(**SMALL, out=str(out), methods=["dense", "asp", "sr-ste"])
    begun = planned_runs(config)[0]
    RunDir(Path(begun.out)).write_config(values_of(begun))  # all that a run killed at once leaves
    return out, compare(config, lambda line: None)


def test_a_comparison_end_to_end(compared):
    out, rows = compared
    assert [row.method for row in rows] == ["dense", "asp", "sr-ste"]
    dense, asp, sr_ste = rows
    assert (dense.density, sr_ste.density, asp.density) == (1.0, 0.5, 0.5)
    assert asp.sad_start == 0
    assert sr_ste.sad_start > 0
    assert dense.macs > sr_ste.macs == asp.macs
    assert [row["method"] for row in json.loads((out / "results.json").read_text())["rows"]] == [
        "dense",
        "asp",
        "sr-ste",
    ]
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["flip_rate"] for run in runs] == [row.flip_rate for row in rows]  # of one seed
    assert all(run["sad_start"] > 0 for run in runs if run["method"] != "asp")
    page = (out / "report.html").read_text()
    assert page.count('<g class="run">') == 18  # 3 runs, 6 charts
    assert "://" not in page
    assert '<abbr title="paired t-test of that difference, with 3 seeds or more">p</abbr>' in page
    assert "<details><summary>What the columns mean</summary>" in page


def test_methods_of_a_seed_start_from_the_same_weights_and_samples(compared):
    start = [
        read_lines(compared[0] / name / "topology.jsonl")[0]["weights"]
        for name in ("dense-seed0", "sr-ste-2of4-0.0002-seed0")
    ]
    assert start[0] == start[1]
    masks = [
        json.loads((compared[0] / name / "result.json").read_text())["mask"]["start"]
        for name in ("dense-seed0", "sr-ste-2of4-0.0002-seed0")
    ]
    assert masks[0] == masks[1]


def test_asp_prunes_the_trained_dense_weights(compared):
    masks = {
        name: json.loads((compared[0] / name / "result.json").read_text())["mask"]
        for name in ("dense-seed0", "asp-2of4-seed0")
    }
    assert masks["asp-2of4-seed0"]["start"] == masks["asp-2of4-seed0"]["end"] == masks["dense-seed0"]["end"]
    assert masks["dense-seed0"]["start"] != masks["dense-seed0"]["end"]


def test_a_dense_run_does_not_say_that_its_weights_are_sparse(compared):
    said = {
        name: json.loads((compared[0] / name / "result.json").read_text())["summary"]
        for name in ("dense-seed0", "asp-2of4-seed0")
    }
    assert said["dense-seed0"] == f"dense; 2:4 would be: {said['asp-2of4-seed0']}"
    assert "weights sparse" in said["asp-2of4-seed0"]


def test_a_second_call_reuses_finished_runs(compared):
    out, rows = compared
    said = []
    again = compare(CompareConfig(**SMALL, out=str(out), methods=["dense", "asp", "sr-ste"]), said.append)
    assert again == rows
    assert all("finished before" in line for line in said)
    assert [line.partition("  ")[0] for line in said] == ["1 of 3", "2 of 3", "3 of 3"]


def test_both_budgets_of_asp_stand_side_by_side(compared):
    out, (dense, *_) = compared
    rows = compare(CompareConfig(**SMALL, out=str(out), methods=["dense", "asp"], equal_budget=True), lambda line: None)
    assert rows[0] == dense
    assert [(row.method, row.epochs, row.steps, row.budget) for row in rows] == [("dense", 2, 10, 1), ("asp", 1, 5, 2)]
    start = json.loads((out / "half" / "dense-seed0" / "result.json").read_text())["mask"]
    assert start["end"] == json.loads((out / "asp-2of4-half-seed0" / "result.json").read_text())["mask"]["start"]
    page = (out / "report.html").read_text()  # of all that is there: 2 x 1 epochs beside 2 x 2
    assert page.count("2 x 1</td>") == page.count("2 x 2</td>") == 1


def test_another_configuration_is_refused(compared):
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.1 -> 0.3\); choose another --out"):
        compare(CompareConfig(**SMALL, out=str(compared[0]), lr=0.3), lambda line: None)


def test_a_failing_run_is_reported_with_its_log(tmp_path):
    config = CompareConfig(**{**SMALL, "batch_size": 200}, out=str(tmp_path), methods=["dense"])
    with pytest.raises(RuntimeError, match=r"(?s)run dense-seed0 ended with exit code 2.*exceeds 160 training samples"):
        compare(config, lambda line: None)
