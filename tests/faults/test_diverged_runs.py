"""A loss that is not finite stops a run and says where it came from; what is written is JSON in any case."""

import json
import math

import pytest
import torch
from torch import nn

from openwork.cli.main import main
from openwork.recipes.classification import TASK
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.divergence import Diverged, first_cause, is_finite
from openwork.recipes.json_files import to_json
from openwork.recipes.module import pl
from openwork.recipes.recipe import train
from openwork.recipes.rundir import read_lines

SMALL = {"limit": 64, "limit_val": 16, "batch_size": 16, "epochs": 2, "threads": 1, "progress": False, "log_every": 1}


def refuse(constant):
    raise ValueError(constant)


def strict(text):
    return json.loads(text, parse_constant=refuse)


class Poison(pl.Callback):
    """Makes one number of a weight, of a gradient or of a buffer infinite, after so many batches."""

    def __init__(self, what, batch):
        self.what, self.left = what, batch

    def on_train_batch_end(self, trainer, module, *_):
        self.left -= 1
        if self.left == 0 and self.what != "gradient":
            tensor = dict([*module.net.named_parameters(), *module.net.named_buffers()])[self.what]
            tensor.data.view(-1)[0] = math.inf

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.left == 1 and self.what == "gradient":
            module.net.fc.bias.grad[0] = math.nan


@pytest.mark.parametrize(
    ("what", "batch", "step", "message"),
    [
        ("bn1.weight", 2, 2, "the loss of step 3 is nan: after that step the weight bn1.weight is not"),
        ("gradient", 2, 2, "the loss of step 3 is nan: the gradient of fc.bias was not finite in the step before"),
        ("bn1.weight", 4, 4, "after step 4 .*nan: .*bn1.weight"),  # the epoch's last: the validation meets it
        ("bn1.running_var", 8, 8, "the buffer bn1.running_var is not finite, all weights are"),
    ],
)
def test_where_it_came_from(tmp_path, what, batch, step, message):
    out = tmp_path / "run"
    with pytest.raises(Diverged, match=message) as error:
        train(Config(**SMALL, out=str(out)), [Poison(what, batch)])
    assert error.value.step == step
    assert not (out / "result.json").exists()
    assert not (out / "model.safetensors").exists()
    assert strict((out / "diverged.json").read_text())["step"] == step


def test_a_run_that_diverged_says_so_when_resumed_and_goes_on_only_when_told_to(tmp_path, capsys):
    out = tmp_path / "run"
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value).lower())]
    words = ["train", "classification", *words, "--lr", "1e30", "--warmup", "0", "--out", str(out)]
    for more in ([], ["--resume"]):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert "the loss of step 2 is nan: the first output that is not finite is that of the layer" in error
        assert "--resume --allow_nan to go on regardless" in error
    assert main([*words, "--resume", "--allow_nan"]) == 0
    assert "DIVERGED: not finite since step 1" in capsys.readouterr().out
    result = strict((out / "result.json").read_text())
    assert result["diverged"]["step"] == 1
    assert result["val_loss"] is None
    assert [line["train_loss"] for line in read_lines(out / "metrics.jsonl") if "train_loss" in line][1:] == [None] * 7
    for name in ("metrics.jsonl", "times.jsonl"):
        for line in (out / name).read_text().splitlines():
            strict(line)
    assert "Diverged, its scores mean nothing" in (out / "report.html").read_text()
    assert main([*words, "--resume"]) == 0
    assert "DIVERGED" in capsys.readouterr().out
    assert main(["report", str(out)]) == 0


def test_the_cause_is_looked_for_in_the_order_of_events():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    batch = torch.ones(1, 2)

    def loss():
        return net(batch).sum()

    assert first_cause(net, {"x": [batch * math.nan]}, loss).startswith("the batch holds numbers that are not finite")
    assert "it is the loss function itself" in first_cause(net, batch, loss)
    net[2].weight.data.fill_(3e38)
    assert "that of the layer 2 (Linear)" in first_cause(net, batch * 10, lambda: net(batch * 1e10).sum())
    assert first_cause(net, batch, None) == "all weights are finite"


def test_json_has_no_numbers_that_are_not_finite():
    text = to_json({"a": [1.5, math.inf, (math.nan, "NaN")], "b": {"c": -math.inf}, "d": True, "e": 3})
    assert strict(text) == {"a": [1.5, None, [None, "NaN"]], "b": {"c": None}, "d": True, "e": 3}
    assert is_finite({"a": [torch.ones(2)], "b": torch.tensor(3), "c": "text"})
    assert not is_finite((torch.ones(2), {"x": torch.tensor([1.0, math.inf])}))


def test_a_score_that_is_null_is_a_dash():
    assert TASK.metrics[0].text(None) == "-"
    assert TASK.metrics[0].full_text(None) == "accuracy - %"
