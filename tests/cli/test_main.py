import json
import subprocess
import sys

import pytest
import torch

import openwork as ow
from openwork.cli.main import main


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"], ["compare", "-h"]])
def test_usage(words, capsys):
    assert main(words) == 0
    assert "openwork compare TASK" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"openwork {ow.__version__}\n"


def test_help_needs_nothing_of_the_training_extra():
    code = "import sys; from openwork.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for module in ("lightning", "jsonargparse", "sklearn", "torchvision", "rich"):
        assert f"'{module}'" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; use one of train, compare, prune, evaluate, report, inspect, "),
        (["train"], "a task is missing; write openwork train {classification,detection,flow,language,segmentation,"),
        (["compare", "clasification"], "there is no task 'clasification'"),
        (["train", "classification", "--model", "resnet19"], "close names: "),
        (["train", "classification", "--data", "cifar10=/no/such"], "data_batch_1"),
        (["report", "/no/such"], "no finished run"),
    ],
)
def test_mistakes_get_one_line_and_status_two(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("openwork: ")
    assert error.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "openwork.recipes.parser", raising=False)
    assert main(["train", "classification"]) == 2
    assert (
        "jsonargparse is not installed; this needs the extra: pip install 'openwork[train]'" in capsys.readouterr().err
    )


def test_every_field_has_a_flag_with_its_default_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "classification", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--weight_decay" in text
    assert "5e-05" in text


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    ow.project(model, "2:4")
    path = tmp_path / "net.safetensors"
    ow.save(model, path, pattern="2:4")
    return path


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_compressed_file_is_listed_by_tensor(verb, saved, capsys):
    assert main([verb, str(saved)]) == 0
    printed = capsys.readouterr().out
    assert ["weight", "4x8", "float32", "2:4", "0.500", "68"] in [line.split() for line in printed.splitlines()]
    assert "1 of 2 tensors sparse" in printed
    assert ("the file is intact" in printed) == (verb == "verify")


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_sparse_tensors_are_listed_first(verb, tmp_path, capsys):
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    ow.project(model, {"1": "4:4", "2": "2:4"})
    ow.save(model, tmp_path / "net.safetensors", pattern={"1": "4:4", "2": "2:4"})
    assert main([verb, str(tmp_path / "net.safetensors")]) == 0
    header, first, *_, summary = capsys.readouterr().out.splitlines()[verb == "verify" :]
    assert (header.split()[0], first.split()[0]) == ("tensor", "2.weight")
    assert summary.startswith("1 of 6 tensors sparse, ")  # N = M is dense


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "openwork", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"openwork {ow.__version__}\n"


def test_verify_fails_on_a_file_whose_indices_are_bent(saved, capsys):
    data = bytearray(saved.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    first = 8 + int.from_bytes(data[:8], "little") + header["weight.indices"]["data_offsets"][0]
    data[first] = 0  # indices 0 and 0: not ascending
    saved.write_bytes(data)
    assert main(["inspect", str(saved)]) == 0  # the header alone says nothing of it
    capsys.readouterr()
    assert main(["verify", str(saved)]) == 2
    assert "weight" in capsys.readouterr().err
