"""A recipe under torchrun: flags alone, as on several machines."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from openwork.tasks.rundir import read_lines

FLAGS = "--devices 2 --strategy ddp --accelerator cpu --limit 128 --epochs 2 --topology_every 2 --progress false"


@pytest.mark.slow
def test_two_processes_train_the_recipe(row, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "openwork.cli", "train", "classification", *FLAGS.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [each["step"] for each in read_lines(tmp_path / "run" / "topology.jsonl")] == [2, 4]  # 128 / 64, twice
    weights = load_file(tmp_path / "run" / "model.safetensors")
    sparse = {name: w for name, w in weights.items() if w.ndim == 4 and w.shape[1] % 4 == 0}
    assert len(sparse) > 5
    for weight in sparse.values():
        assert int((weight.movedim(1, -1) != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
    row(
        "Two processes",
        "`torchrun`, `openwork train classification --devices 2 --strategy ddp`",
        packages=("lightning",),
    )
