"""A recipe under torchrun: flags alone, on one machine and on two, restarted where it was killed."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from plain_loop import distance

from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.rundir import read_lines
from openwork.recipes.weights import read_weights

RECIPE = {
    "accelerator": "cpu",
    "limit": 128,
    "epochs": 2,
    "clip": 0.5,
    "topology_every": 2,
    "progress": False,
    "threads": 1,
}
STEPS = [2, 4]  # 128 images, 64 a step, twice
FLAGS = [word for name, value in RECIPE.items() for word in (f"--{name}", str(value).lower())]
TRAIN = ["-m", "openwork.cli", "train", "classification", *FLAGS]
TWO = ["--standalone", "--nproc-per-node", "2"]
LIMIT = 1200  # seconds, for a machine that does much else


def torchrun(*commands):
    """Run them side by side to their end, and end them and their children where one fails or takes too long."""
    python = [sys.executable, "-m", "torch.distributed.run"]
    # The second: else restarted processes meet the addresses of the dead ones (pytorch/pytorch issue 135712).
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with tempfile.TemporaryFile("w+") as told:
        started = [subprocess.Popen([*python, *each], stderr=told, env=environment) for each in commands]
        try:
            codes = [process.wait(LIMIT) for process in started]
        finally:
            for process in started:
                end(process)
        told.seek(0)
        assert not any(codes), told.read()


def end(process):
    """By SIGTERM first: a torchrun ends its processes then, which are no part of its process group."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def two_processes(strategy, out):
    torchrun([*TWO, *TRAIN, "--devices", "2", "--strategy", strategy, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The run directory of two processes that ran to the end."""
    return two_processes("fsdp2", tmp_path_factory.mktemp("torchrun") / "run")


def weights(out):
    return read_weights(out / "model.safetensors")


def is_the_same(out, other):
    assert (out / "topology.jsonl").read_text() == (other / "topology.jsonl").read_text()
    return distance(weights(out), weights(other))


@pytest.mark.slow
def test_two_processes_train_a_recipe_sharded(row, sharded):
    assert [each["step"] for each in read_lines(sharded / "topology.jsonl")] == STEPS
    sparse = {name: w for name, w in weights(sharded).items() if w.ndim == 4 and w.shape[1] % 4 == 0}
    assert len(sparse) > 5
    for weight in sparse.values():
        assert int((weight.movedim(1, -1) != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
    assert json.loads((sharded / "result.json").read_text())["density"] == 0.5
    row("Two processes", "a recipe by flags: `torchrun ... --devices 2 --strategy fsdp2`", packages=("lightning",))


@pytest.mark.for_the_page
def test_ddp_ends_as_fsdp2(row, sharded, tmp_path):
    difference = is_the_same(two_processes("ddp", tmp_path / "run"), sharded)
    assert difference < 1e-6
    what = "a recipe by flags: `torchrun ... --devices 2 --strategy ddp`, against FSDP2"
    row("Two processes", what, difference={"resnet8": difference}, tolerance=1e-6, packages=("lightning",))


@pytest.mark.for_the_page
def test_two_machines_end_as_one(row, sharded, tmp_path):
    """Two torchruns of one process each, that know of each other only by address and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    train = [*TRAIN, "--nodes", "2", "--strategy", "fsdp2", "--out", str(tmp_path / "run")]
    torchrun(*([*where, "--node-rank", rank, *train] for rank in "01"))
    difference = is_the_same(tmp_path / "run", sharded)
    assert difference == 0
    what = "a recipe by flags on two machines: `torchrun --nnodes 2 ... --nodes 2 --strategy fsdp2`, against one"
    row("Two processes", what, difference={"resnet8": difference}, tolerance=1e-6, packages=("lightning",))


@pytest.mark.for_the_page
def test_a_killed_run_is_restarted_by_torchrun_and_ends_the_same(sharded, tmp_path):
    """Both processes are killed after three of four steps; the checkpoint lies after two."""
    config = RECIPE | {"devices": 2, "strategy": "fsdp2", "resume": True, "out": str(tmp_path / "run")}
    script = Path(__file__).with_name("run_and_kill.py")
    torchrun([*TWO, "--max-restarts", "1", str(script), "classification", json.dumps(config), "3"])
    assert is_the_same(tmp_path / "run", sharded) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (sharded / "metrics.jsonl").read_text()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload"])
def test_the_older_fsdp_is_refused(strategy):
    with pytest.raises(ValueError, match="is Lightning's FSDP1, which cannot hold masked weights; use fsdp2"):
        Config(strategy=strategy)
