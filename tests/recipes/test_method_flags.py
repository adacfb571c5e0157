"""Any registered method can be named on the command line, compared and reported; any other is refused before work."""

import json
from dataclasses import dataclass

import pytest

import openwork as ow
from openwork.methods import METHODS
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.compare import planned_runs
from openwork.recipes.config import comparison, values_of
from openwork.recipes.method_flags import label_of, option_flags
from openwork.recipes.parser import parse
from openwork.recipes.recipe import train
from openwork.recipes.report import write_report
from openwork.recipes.rundir import RunDir

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
        (Config, ["--method", "ste", "--decay", "1"], "--decay is no option of ste, which has none"),
        (Config, ["--refresh_every", "5"], "--refresh_every is no option of sr-ste, which has --decay"),
        (CompareConfig, ["--refresh_every", "5"], "--refresh_every is no option of dense, asp, ste, sr-ste"),
        (Config, ["--method", "transposable-sr-ste", "--refresh_every", "0"], "refresh_every=0"),
        (CompareConfig, ["--decay"], "need at least one value"),
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
