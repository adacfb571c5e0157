"""Every way to name a model on the command line, in every command that takes one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from in_process import InProcess
from torch import nn

import openwork as ow
from openwork.cli import source as sources
from openwork.cli.main import main
from openwork.cli.source import example_of, open_model

NET = """
import torch
def network():
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = torch.nn.Embedding(8, 16), torch.nn.Linear(16, 16)
    def forward(self, ids, x=0.0):
        return self.fc(self.table(ids)) + x
number = lambda: 3
def broken():
    import no_such_package
def sparsified():
    import openwork
    model = network()
    openwork.sparsify(model, "2:4", openwork.SRSTE())
    return model
def picky(size):
    return torch.nn.Linear(size, size)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module `my_net` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net.py").write_text(NET)
    yield tmp_path
    sys.modules.pop("my_net", None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compressed(folder):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    ow.project(model, {"0": "2:4"})
    ow.save(model, "net.safetensors", pattern={"0": "2:4"})
    return model


@pytest.fixture
def bert(folder):
    """A folder as transformers writes it: a tiny BERT whose encoder is 2:4."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, max_position_embeddings=24, **sizes)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval().to(torch.bfloat16)
    ow.project(model, "2:4", exclude=["*embeddings*", "classifier"])
    model.save_pretrained("bert")
    return model


def test_a_module_and_a_factory(folder):
    found = open_model("my_net:network", shapes=["2x16"])
    assert not found.model.training
    assert found.model(found.example).shape == (2, 4)
    assert found.selection is None


def test_inputs_of_every_kind(folder):
    found = open_model("my_net:Two", shapes=["ids=1x5:int64", "x=1:float32"])
    assert found.model(**found.example).shape == (1, 5, 16)
    first, second = example_of(["2x3:bfloat16", "4:bool"])
    assert (first.dtype, first.shape, second.tolist()) == (torch.bfloat16, (2, 3), [True] * 4)
    assert torch.equal(example_of(["2x3"]), example_of(["2x3"]))


def test_a_compressed_file_with_its_architecture(compressed):
    found = open_model("net.safetensors", model="my_net:network", shapes=["2x16"])
    assert torch.equal(found.model[0].weight, compressed[0].weight)
    assert found.selection.patterns == {"0.weight": ow.Pattern(2, 4)}


def test_a_folder_of_transformers(bert):
    found = open_model("bert")
    assert type(found.model) is type(bert)
    assert found.model.dtype == torch.bfloat16
    assert found.example["input_ids"].shape == (1, 24)
    with torch.no_grad():
        assert torch.equal(found.model(**found.example).logits, bert(**found.example).logits)
    assert open_model("bert", shapes=["input_ids=2x7:int64"]).example["input_ids"].shape == (2, 7)


def test_nothing_of_transformers_is_fetched(bert):
    Path("bert/model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        open_model("bert")


def test_plan(bert, compressed, threads, capsys):
    assert main(["plan", "my_net:network", "--input", "1x16", "--batch", "3", "--threads", "1"]) == 0
    assert "3x16" in capsys.readouterr().out
    assert main(["plan", "net.safetensors", "--model", "my_net:network", "--input", "1x16", "--threads", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0.weight", "8x16", "2:4"] in [line[:3] for line in lines]
    words = ["plan", "bert", "--exclude", "*embeddings*", "classifier", "--threads", "1"]
    assert main(words) == 0
    assert "bert.encoder.layer.0.intermediate.dense.weight" in capsys.readouterr().out
    assert main(["plan", "net.safetensors", "--model", "my_net:network", "--input", "1x16", "--pattern", "1:4"]) == 2
    assert "records its patterns: leave --pattern and --exclude out" in capsys.readouterr().err


def test_export(bert, compressed, capsys):
    words = ["--out", "net.pt2", "--pattern", "2:4", "--exclude", "*embeddings*", "classifier"]
    assert main(["export", "my_net:network", "--input", "2x16", "--out", "net.pt2"]) == 0
    assert main(["export", "net.safetensors", "--model", "my_net:network", "--input", "2x16", "--out", "n.pt2"]) == 0
    assert main(["export", "bert", *words]) == 0
    assert capsys.readouterr().out.count("gives the model's outputs") == 3


def test_verify_what_a_model_multiplies(bert, compressed, capsys):
    words = ["--pattern", "2:4", "--exclude", "*embeddings*", "classifier"]
    assert main(["verify", "bert", *words]) == 0  # the file
    assert "verified: 2:4" in capsys.readouterr().out
    assert main(["verify", "bert", *words, "--input", "input_ids=1x8:int64"]) == 0  # the model
    assert "every weight keeps its pattern" in capsys.readouterr().out
    assert main(["verify", "net.safetensors", "--model", "my_net:network", "--input", "2x16"]) == 0
    assert "every weight keeps its pattern" in capsys.readouterr().out
    assert main(["verify", "my_net:network", "--input", "2x16", "--pattern", "2:4"]) == 2
    assert "2 weights are denser than their pattern" in capsys.readouterr().err


def test_bench(compressed, threads, monkeypatch):
    from openwork.bench import forward

    monkeypatch.setattr(forward, "Worker", InProcess)
    words = ["--patterns", "2:4", "--batches", "1", "--threads", "1", "--seconds", "0", "--no-compile"]
    words += ["--engines", "eager"]
    assert main(["bench", "net.safetensors", "--model", "my_net:network", "--input", "1x16", *words]) == 0
    assert "net.safetensors" in Path("bench.csv").read_text()
    assert main(["bench", "my_net:sparsified", "--input", "1x16", *words]) == 0
    assert "my_net:sparsified" in Path("bench.csv").read_text()


@pytest.mark.slow
def test_a_run_directory(tmp_path, threads, capsys):
    run = str(tmp_path / "run")
    flags = ["--epochs", "1", "--warmup", "0.1", "--limit", "128", "--progress", "false", "--model", "resnet8"]
    flags += ["--remainder", "pad"]
    assert main(["train", "classification", "--out", run, "--quiet", *flags]) == 0
    found = open_model(run)
    assert (str(found.selection.pattern), found.selection.remainder) == ("2:4", "pad")
    assert found.method == "sr-ste"
    assert main(["plan", run, "--threads", "1"]) == 0
    assert main(["verify", run, "--pattern", "2:4"]) == 0
    assert main(["export", run, "--out", str(tmp_path / "net.pt2")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "net.safetensors"], "net.safetensors is weights and no model: add --model MODULE:FACTORY"),
        (["plan", "my_net:network"], "my_net:network does not say what its input is: add --input SHAPE"),
        (["plan", "my_net:nothing", "--input", "1"], "SOURCE my_net:nothing: module 'my_net' has no attribute"),
        (["plan", "no_net:nothing", "--input", "1"], "SOURCE no_net:nothing: No module named 'no_net'"),
        (["plan", "my_net:number", "--input", "1"], "SOURCE my_net:number gives a int; needed an nn.Module"),
        (["plan", "my_net:broken", "--input", "1"], "SOURCE my_net:broken: No module named 'no_such_package'"),
        (["plan", "my_net:network", "--input", "1,16"], "--input 1,16: needed sizes with 'x' between them"),
        (["plan", "my_net:network", "--input", "1x16:int4"], "perhaps one of float64, float32"),
        (["plan", "my_net:network", "--input", "a=1x16", "2"], "needed names for all of them, or for none"),
        (["plan", "empty"], "empty is a folder with nothing; needed a run's config.yaml, transformers' config.json"),
        (["plan", "resnet19"], "resnet19 is no file or folder here, and no model of torchvision: "),
        (["plan", "gone.safetensors"], "there is no gone.safetensors; --help lists what names a model"),
        (
            ["plan", "no_folder/x"],
            "there is no no_folder/x; weights on the Hugging Face Hub are named hf://no_folder/x",
        ),
        (["plan", "broken"], "broken/config.json: Expecting property name"),
        (["verify", ":"], "SOURCE :: needed package.module:factory"),
        (["plan", "my_net:network", "--input", "1x16", "--batch", "0"], "a batch of 0 samples; needed at least 1"),
        (["plan", "my_net:picky", "--input", "1x16"], "picky() missing 1 required positional argument"),
        (["plan", "my_net:network", "--input", "x=1x16"], "--input: missing a required argument: 'input'"),
        (["plan", "diffuser"], "has no model_type: it is no configuration of transformers"),
    ],
)
def test_mistakes_get_one_line(compressed, threads, words, message, capsys):
    Path("empty").mkdir()
    Path("diffuser").mkdir()
    Path("diffuser/config.json").write_text(json.dumps({"_class_name": "UNet"}))
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{bad")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_the_forms(capsys):
    for command in ("plan", "export", "verify"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert sources.FORMS in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "inspect", "plan", "export", "bench"])
def test_a_run_that_did_not_finish_is_named(command, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("task: classification\n")
    assert main([command, str(tmp_path), *(["--out", str(tmp_path / "net.onnx")] if command == "export" else [])]) == 2
    assert f"{tmp_path} is a run that did not finish: it has no model.safetensors yet" in capsys.readouterr().err
