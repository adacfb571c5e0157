"""Any registered method can be named on the command line, compared and reported; any other is refused before work."""

import json
from dataclasses import dataclass

import pytest

import openwork as ow
from openwork.methods import METHODS
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.compare import planned_runs
from openwork.recipes.config import comparison, values_of
from openwork.recipes.mask_schedules import parse_schedule
from openwork.recipes.method_flags import build_method, label_of, option_flags
from openwork.recipes.parser import parse
from openwork.recipes.recipe import train
from openwork.recipes.report import _rank, write_report
from openwork.recipes.rundir import RunDir, read_lines

CompareConfig = comparison(Config)
SMALL = {"limit": 64, "batch_size": 32, "epochs": 1, "warmup": 0, "topology_every": 1, "threads": 1, "progress": False}


@dataclass(frozen=True)
class Toy(ow.STE):
    """A method with options that no other has."""

    steps: int = 100
    power: float = 0.5
    name = "toy"


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Toy)


@pytest.mark.usefixtures("toy")
def test_a_new_method_is_planned_with_its_own_options():
    words = ["--methods", "toy", "ste", "--steps", "5", "10", "--seeds", "0"]
    config = parse(CompareConfig, words, "openwork compare classification", "")
    runs = planned_runs(config)
    assert [(run.method, run.method_options) for run in runs] == [
        ("ste", {}),
        ("toy", {"steps": 5, "power": 0.5}),
        ("toy", {"steps": 10, "power": 0.5}),
    ]
    assert len({run.out for run in runs}) == 3


@pytest.mark.usefixtures("toy")
def test_a_new_method_is_trained_reported_and_read_back(tmp_path):
    config = parse(Config, ["--method", "toy", "--steps", "7"], "openwork train classification", "")
    config = Config(**SMALL, method="toy", method_options=config.method_options, out=str(tmp_path / "run"))
    result = train(config)
    assert result["config"]["steps"] == 7
    assert label_of(result["config"]) == "toy 2:4 steps=7 power=0.5"
    assert Config.from_values(RunDir(tmp_path / "run").read_config()) == config
    assert "toy 2:4 steps=7 power=0.5" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("none", ow.Schedule()),
        ("mask-decay=9", ow.MaskDecay(9)),
        ("mask-decay=9:linear", ow.MaskDecay(9, linear=True)),
        ("structure-decay=9:geometric", ow.StructureDecay(9, geometric=True)),
        ("ramp=9:cosine", ow.Ramp(9, "cosine")),
        ("dense-warmup=4", ow.DenseWarmup(4)),
        ("dense-tail=4", ow.DenseTail(4)),
        ("dense-warmup=4,ramp=9,dense-tail=20", ow.DenseTail(20, ow.DenseWarmup(4, ow.Ramp(9)))),
    ],
)
def test_a_schedule_is_named_in_the_order_of_time(text, schedule):
    assert parse_schedule(text) == schedule
    config = parse(Config, ["--method", "ste", "--mask_schedule", text], "openwork", "")
    assert build_method("ste", config.method_options) == ow.STE(schedule=schedule)
    assert label_of(values_of(config)) == f"ste 2:4 mask_schedule={text}"


def test_schedules_are_compared_and_only_of_methods_that_take_one():
    words = ["--methods", "dense", "ste", "--mask_schedule", "ramp=2:cubic", "mask-decay=2", "--seeds", "0"]
    runs = planned_runs(parse(CompareConfig, words, "openwork compare classification", ""))
    assert [(run.method, run.method_options) for run in runs] == [
        ("dense", {}),
        ("ste", {"mask_schedule": "ramp=2:cubic"}),
        ("ste", {"mask_schedule": "mask-decay=2"}),
    ]
    assert runs[1].out.endswith("ste-2of4-ramp=2-cubic-seed0")


def test_the_report_shows_what_the_schedule_does(tmp_path):
    options = {"method": "ste", "method_options": {"mask_schedule": "ramp=2"}, "log_every": 1}
    config = Config(**SMALL | {"batch_size": 16}, **options, out=str(tmp_path / "run"))
    assert train(config)["density"] == 0.5
    records = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "kept" in r]
    assert [record["kept"] for record in records] == pytest.approx([0.75, 0.5, 0.5, 0.5])
    page = write_report(tmp_path / "run").read_text()
    assert "Share of weights that the schedule keeps" in page
    assert "Mask decay beta" not in page


def test_runs_with_and_without_a_schedule_stand_in_one_report():
    configs = [values_of(Config(method="ste", method_options=o)) for o in ({"mask_schedule": "ramp=2"}, {})]
    assert [config.get("mask_schedule") for config in sorted(configs, key=_rank)] == [None, "ramp=2"]


def test_a_run_that_ends_dense_is_a_dense_one(tmp_path):
    options = {"method": "ste", "method_options": {"mask_schedule": "dense-tail=1"}}
    result = train(Config(**SMALL, **options, out=str(tmp_path / "run")))
    assert result["density"] == 1
    assert result["macs"] == result["macs_dense"]


def test_a_run_that_is_shorter_than_its_schedule_is_refused(tmp_path):
    options = {"method": "ste", "method_options": {"mask_schedule": "ramp=3"}}
    with pytest.raises(ValueError, match="ends after step 3, and the run has 2 steps"):
        train(Config(**SMALL, **options, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_flag_that_is_on_is_part_of_the_label():
    on, off = (parse(Config, ["--decay", "0.5", *words], "openwork", "") for words in (["--decoupled", "true"], []))
    assert on.method_options == {"decay": 0.5, "decoupled": True}
    assert label_of(values_of(on)) == "sr-ste 2:4 decay=0.5 decoupled=True"
    assert label_of(values_of(off)) == "sr-ste 2:4 decay=0.5"


def test_a_report_on_a_method_that_is_not_registered_is_refused(tmp_path):
    run = RunDir(tmp_path / "run")
    config = values_of(Config()) | {"method": "toy"}
    run.write_result({"config": config})
    with pytest.raises(ValueError, match="method 'toy' is not known; use one of dense, asp"):
        write_report(tmp_path / "run")


@pytest.mark.parametrize(
    ("cls", "words", "message"),
    [
        (Config, ["--method", "magic"], "method 'magic' is not known; use one of dense, asp, ste, sr-ste"),
        (CompareConfig, ["--methods", "ste", "magic"], "method 'magic' is not known"),
        (Config, ["--method", "ste", "--decay", "1"], "--decay is no option of ste, which has --mask_schedule"),
        (Config, ["--refresh_every", "5"], "--refresh_every is no option of sr-ste, which has --decay"),
        (CompareConfig, ["--refresh_every", "5"], "--refresh_every is no option of dense, asp, ste, sr-ste"),
        (Config, ["--method", "transposable-sr-ste", "--refresh_every", "0"], "refresh_every=0"),
        (CompareConfig, ["--decay"], "need at least one value"),
        (Config, ["--mask_schedule", "ramp"], "'ramp' is no part of one; needed NAME=STEPS in the order of time"),
        (Config, ["--mask_schedule", "ramp=5,mask-decay=5"], "mask_schedule 'ramp=5,mask-decay=5': NAME=STEPS"),
        (Config, ["--mask_schedule", "dense-tail=5,ramp=5"], "mask_schedule 'dense-tail=5,ramp=5': NAME=STEPS"),
        (Config, ["--mask_schedule", "mask-decay=5:cubic"], "'cubic' is not known"),
        (Config, ["--mask_schedule", "ramp=0"], "steps=0"),
        (Config, ["--method", "asp", "--mask_schedule", "ramp=5"], "--mask_schedule is no option of asp"),
        (Config, ["--method", "s-ste", "--mask_schedule", "ramp=5"], "SSTE with Ramp"),
    ],
)
def test_what_cannot_be_is_refused_before_training(cls, words, message):
    with pytest.raises(ValueError, match=message):
        parse(cls, words, "openwork", "")


def test_options_of_methods_and_fields_of_recipes_have_different_names():
    assert not {name for name in option_flags() if name in Config.__dataclass_fields__}


@pytest.mark.parametrize("method", ["dense", "transposable-sr-ste"])
def test_a_preset_s_options_are_taken_where_the_method_has_them(method):
    config = parse(Config, ["--preset", "paper", "--method", method], "openwork", "")
    assert config.method_options == ({} if method == "dense" else {"decay": 2e-4, "refresh_every": 40})


def test_a_stored_row_is_in_the_order_of_the_registry():
    methods = [run.method for run in planned_runs(CompareConfig(methods=["sr-ste", "asp"], seeds=[0]))]
    assert methods == ["dense", "asp", "sr-ste"]
    assert json.dumps(values_of(CompareConfig(method_options={"decay": [1.0]})))
