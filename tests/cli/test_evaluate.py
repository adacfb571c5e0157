"""`openwork evaluate`: the scores of a run, wherever it lies, and of a file, on any data."""

import json
import shutil
import warnings

import pytest
from safetensors.torch import save_file

from openwork.cli.main import main
from openwork.recipes.classification import ClassificationConfig
from openwork.recipes.recipe import train
from openwork.recipes.trained import load_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    small = {"limit": 160, "limit_val": 50, "batch_size": 32, "epochs": 1, "progress": False, "threads": 1}
    return out, train(ClassificationConfig(**small, out=str(out)))


def evaluated(capsys, *words):
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_scores_what_its_result_says_wherever_it_is(trained, tmp_path, capsys):
    out, result = trained
    moved = shutil.copytree(out, tmp_path / "moved")
    for folder in (out, moved):
        found = evaluated(capsys, folder)
        assert found == {key: result[key] for key in found}
        assert {"val_accuracy", "val_top5"} <= set(found)


def test_flags_stand_in_place_of_those_of_the_run(trained, capsys):
    out, result = trained
    assert main(["evaluate", str(out), "--limit_val", "7"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 7 validation samples of digits" in said
    assert said.startswith("accuracy ")
    held_out = evaluated(capsys, out, "--limit", "0", "--hold_out", "50")  # samples of the training set
    assert held_out != {key: result[key] for key in held_out}


def test_a_file_needs_its_task_and_its_model(trained, tmp_path, capsys):
    out, result = trained
    found = evaluated(capsys, "classification", out / "model.safetensors", "--limit_val", "50")
    assert found == {key: result[key] for key in found}
    net, *_ = load_run(out)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "plain.safetensors")
    assert evaluated(capsys, "classification", tmp_path / "plain.safetensors", "--limit_val", "50") == found
    assert main(["evaluate", "classification", str(out / "model.safetensors"), "--model", "resnet20"]) == 2
    assert "does not fit this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/run"], "no/such/run is neither a run nor a task with a file"),
        (["classification"], "openwork evaluate RUN, or openwork evaluate {classification,"),
        (["classification", "no.safetensors"], "evaluate no.safetensors: there is no no.safetensors"),
    ],
)
def test_what_is_not_there_is_named(words, message, capsys):
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def test_usage(capsys):
    assert main(["evaluate", "--help"]) == 0
    assert "openwork evaluate RUN" in capsys.readouterr().out
    assert main(["evaluate"]) == 2


def test_evaluating_changes_nothing(trained, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in trained[0].iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluated(capsys, trained[0])
    assert {path.name: path.stat().st_mtime_ns for path in trained[0].iterdir()} == before
