"""A run's weights are a compressed file that every command reads, with the usual file mode."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from openwork.cli.main import main
from openwork.recipes.models import build_model
from openwork.recipes.weights import load_weights, read_weights

FLAGS = "--limit 64 --batch_size 32 --epochs 1 --warmup 0 --topology_every 1 --threads 1 --progress false --quiet"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sparse run, a dense one, and ASP from the dense one, by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    for method, more in (("sr-ste", []), ("dense", []), ("asp", ["--init", str(folder / "dense")])):
        words = ["train", "classification", *FLAGS.split(), "--method", method, *more, "--out", str(folder / method)]
        assert main(words) == 0
    return folder


@pytest.mark.parametrize(("method", "sparse"), [("sr-ste", 9), ("asp", 9), ("dense", 0)])
def test_inspect_and_verify_read_a_run(runs, method, sparse, capsys):
    file = str(runs / method / "model.safetensors")
    for verb in ("inspect", "verify"):
        assert main([verb, file]) == 0
        assert f"{sparse} of " in capsys.readouterr().out


def test_a_sparse_file_is_smaller_and_everyone_may_read_it(runs):
    dense, sparse = (runs / name / "model.safetensors" for name in ("dense", "sr-ste"))
    assert sparse.stat().st_size < 0.65 * dense.stat().st_size
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (dense, sparse)} == {0o666 & ~umask}


def test_asp_started_from_the_weights_of_the_dense_run(runs):
    first, last = (read_weights(runs / name / "model.safetensors") for name in ("dense", "asp"))
    assert first.keys() == last.keys()
    kept = last["layer3.0.conv2.weight"] != 0
    assert kept.float().mean() == 0.5
    groups = first["layer3.0.conv2.weight"].abs().movedim(1, -1).unflatten(-1, (-1, 4))
    best = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2).indices, True)
    assert torch.equal(kept.movedim(1, -1).unflatten(-1, (-1, 4)), best)


def test_ordinary_safetensors_files_are_read_too(runs, tmp_path):
    net = build_model("resnet8", classes=10, channels=1)
    weights = read_weights(runs / "sr-ste" / "model.safetensors")
    save_file(weights, tmp_path / "plain.safetensors")
    load_weights(net, tmp_path / "plain.safetensors")
    assert all(torch.equal(net.state_dict()[name], weights[name]) for name in weights)
    assert read_weights(tmp_path / "plain.safetensors").keys() == weights.keys()
