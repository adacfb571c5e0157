"""A run killed at any batch and resumed ends exactly as one that was not: weights, metrics, topology."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.recipe import train
from openwork.recipes.weights import read_weights

# 4 optimizer steps an epoch, of two micro-batches; dropout draws from torch's generator.
RECIPE = {
    "limit": 140,
    "batch_size": 32,
    "accumulate": 2,
    "epochs": 3,
    "dropout": 0.3,
    "checkpoint_every": 3,
    "topology_every": 1,
    "log_every": 1,
    "progress": False,
    "threads": 1,
}


def run(out, kill_after=0, resume=False):
    config = {**RECIPE, "out": str(out), "resume": resume}
    script = Path(__file__).with_name("run_and_kill.py")
    return subprocess.run(
        [sys.executable, script, "classification", json.dumps(config), str(kill_after)], check=False
    ).returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(Config(**RECIPE, out=str(out / "run")))
    return out / "run"


@pytest.mark.slow
def test_a_run_killed_three_times_ends_bit_for_bit_as_one_that_was_not(uninterrupted, tmp_path):
    """24 batches, two a step, four steps an epoch; checkpoints lie before steps 3, 4, 6, 8 and 9."""
    out = tmp_path / "run"
    assert run(out, kill_after=1) == -signal.SIGKILL  # before the first checkpoint: starts anew
    assert run(out, kill_after=11, resume=True) == -signal.SIGKILL  # in the middle of step 5: goes on with step 4
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5
    assert run(out, kill_after=8, resume=True) == -signal.SIGKILL  # the epoch's last batch, not yet validated
    assert not (out / "result.json").exists()
    assert run(out, resume=True) == 0
    for name in ("metrics.jsonl", "topology.jsonl"):
        assert (out / name).read_text() == (uninterrupted / name).read_text()
    a, b = read_weights(out / "model.safetensors"), read_weights(uninterrupted / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
