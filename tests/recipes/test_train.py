"""The recipe end to end on a slice of the digits."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml

import openwork as ow
from openwork.recipes.classification import TASK
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.module import lr_factor
from openwork.recipes.recipe import prepare, train
from openwork.recipes.rundir import read_lines
from openwork.recipes.trained import evaluate, load_run, read_run
from openwork.recipes.weights import read_weights

SMALL = {
    "limit": 320,
    "batch_size": 32,
    "epochs": 2,
    "topology_every": 2,
    "log_every": 2,
    "progress": False,
    "threads": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(Config(**SMALL, out=str(out), exclude=["fc"]))


def test_a_run_directory_is_complete(trained):
    out, result = trained
    present = {path.name for path in out.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "topology.jsonl", "checkpoints", "model.safetensors", "report.html"}
    assert files <= present
    assert list(out.glob("tensorboard/events*"))
    assert json.loads((out / "result.json").read_text()) == result
    assert yaml.safe_load((out / "config.yaml").read_text()) == result["config"]
    assert read_run(out) == (TASK, Config(**SMALL, out=str(out), exclude=["fc"]))


def test_metrics_hold_a_line_per_logged_step_and_per_validation(trained):
    metrics = read_lines(trained[0] / "metrics.jsonl")
    assert [r["step"] for r in metrics if "train_loss" in r] == list(range(2, 21, 2))
    assert [(r["step"], r["epoch"]) for r in metrics if "val_loss" in r] == [(10, 0), (20, 1)]
    assert [r["step"] for r in read_lines(trained[0] / "topology.jsonl")] == list(range(2, 21, 2))
    rates = [r["lr"] for r in metrics if "lr" in r]
    assert rates[4] == pytest.approx(0.1)  # step 10, the end of the warm-up
    assert rates[-1] == pytest.approx(0.1 * lr_factor(19, 10, 20))


def test_training_learns(trained):
    losses = [r["train_loss"] for r in read_lines(trained[0] / "metrics.jsonl") if "train_loss" in r]
    assert losses[-1] < 0.8 * losses[0]


def test_the_saved_model_is_sparse_dense_named_and_scores_what_the_result_says(trained):
    out, result = trained
    weights = read_weights(out / "model.safetensors")
    task, config = read_run(out)
    data, net, _ = prepare(task, config)
    ow.finalize(net)
    net.load_state_dict(weights)
    ow.verify(net, pattern=dict.fromkeys(sparse_names(result), "2:4"))
    with torch.no_grad():
        correct = sum((net.eval()(x).argmax(1) == y).sum() for x, y in data.val_batches([range(data.val_count)]))
    assert int(correct) / data.val_count == pytest.approx(result["val_accuracy"])
    assert result["density"] == 0.5


def sparse_names(result):
    return [layer["name"] for layer in result["layers"] if layer["pattern"]]


def test_excluded_and_impossible_layers_are_listed_with_reasons(trained):
    left = {layer["name"]: layer["reason"] for layer in trained[1]["layers"] if not layer["pattern"]}
    assert set(left) == {"conv1.weight", "fc.weight"}
    assert all(left.values())


def test_the_report_loads_nothing_from_elsewhere(trained):
    page = re.sub(r"base64,[\s\w+/=]+", "", (trained[0] / "report.html").read_text())
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\((?!#)", page.replace("</", "<"))
    for expected in ("Validation accuracy", "layer3.0.conv2.weight", 'class="run"', "At the start", "topology_every"):
        assert expected in page


def test_channels_last_changes_how_weights_lie_and_nothing_else(trained, tmp_path):
    config = Config(**SMALL, out=str(tmp_path / "run"), exclude=["fc"], channels_last=True)
    weights = [each for each in prepare(TASK, config)[1].parameters() if each.ndim == 4]
    last = [each for each in weights if not each.is_contiguous()]
    assert len(last) == sum(each.shape[1] > 1 and each.shape[2] > 1 for each in weights) > 2
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in last)
    result = train(config)
    assert result["mask"]["start"] == trained[1]["mask"]["start"]
    assert result["val_loss"] == pytest.approx(trained[1]["val_loss"], rel=0.05)
    net, *_ = load_run(tmp_path / "run")
    assert evaluate(tmp_path / "run", net)["val_accuracy"] == result["val_accuracy"]


def test_an_occupied_directory_is_refused(trained):
    config = Config.from_values(trained[1]["config"])
    with pytest.raises(FileExistsError, match="add --resume"):
        train(config)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.1 -> 0.05\)"):
        train(replace(config, lr=0.05, resume=True))
    assert train(replace(config, resume=True)) == trained[1]


def test_bad_input_leaves_no_directory(tmp_path):
    with pytest.raises(ValueError, match="unknown model"):
        train(Config(model="resnet19", out=str(tmp_path / "run")))
    with pytest.raises(FileNotFoundError, match="give a finished run directory"):
        train(Config(method="asp", init=str(tmp_path / "nothing"), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_init_of_another_model_is_refused(trained):
    with pytest.raises(ValueError, match="does not fit this model"):
        prepare(TASK, Config(method="asp", model="resnet14", init=str(trained[0])))


def test_a_limit_takes_the_first_images():
    assert TASK.load_data(Config(limit=100)).train_count == 100
    assert TASK.load_data(Config(limit_val=50)).val_count == 50
    assert TASK.load_data(Config()).train_count == 1437


def test_the_schedule_warms_up_and_ends_near_zero():
    factors = [lr_factor(step, 10, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3


def test_remainder_says_what_happens_to_axes_that_m_does_not_divide():
    """All of resnet8's axes are multiples of 16 but the first one."""
    _, _, report = prepare(TASK, Config(pattern="3:5", remainder="pad"))
    assert {row.name for row in report.rows if not row.pattern} == {"conv1.weight"}  # one channel
    with pytest.raises(ValueError, match="not a multiple of 5"):
        prepare(TASK, Config(pattern="3:5", remainder="error"))
    with pytest.raises(ValueError, match="remainder 'drop' is not known; use one of skip, pad, error"):
        Config(remainder="drop")
