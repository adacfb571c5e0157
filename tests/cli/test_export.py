"""openwork export, and openwork verify for ONNX files, as a user types them."""

from __future__ import annotations

import sys
import types

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

import openwork as ow
from openwork.cli import export as exporting
from openwork.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of ow.save, in the current folder, and a module `made` with what makes its network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(network=network, number=lambda: 3, Net=nn.Linear))
    model = network()
    ow.project(model, {"0": "2:4"})
    ow.save(model, "net.safetensors", pattern={"0": "2:4"})
    return model


GIVEN = ["--model", "made:network", "--input", "2x16"]


def test_onnx_and_its_verification(file, capsys):
    assert main(["export", "net.safetensors", "--out", "net.onnx", "--dynamic-batch", *GIVEN]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["0.weight", "8x16", "float32", "Gemm", "2:4", "0.500"] in lines
    assert ["2.weight", "4x8", "float32", "Gemm", "dense", "1.000"] in lines
    assert "ONNX Runtime gives the model's outputs" in printed
    shape = onnx.load("net.onnx").graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param
    assert main(["verify", "net.onnx"]) == 0
    assert "verified: 1 of 2 matmuls held to what was recorded" in capsys.readouterr().out
    assert main(["verify", "net.onnx", "--pattern", "2:4"]) == 2
    assert "2.weight: 8 of 8 groups hold more than 2 of 4" in capsys.readouterr().err
    assert main(["verify", "net.onnx", "--pattern", "2:4", "--exclude", "2.*"]) == 0

    model = onnx.load("net.onnx")
    (weight,) = [each for each in model.graph.initializer if each.name == "0.weight"]
    weight.CopyFrom(numpy_helper.from_array(np.ones((8, 16), np.float32), "0.weight"))
    onnx.save(model, "bent.onnx")
    assert main(["verify", "bent.onnx"]) == 2
    assert "0.weight: 32 of 32 groups hold more than 2 of 4 (the worst 4)" in capsys.readouterr().err
    del model.metadata_props[:]
    onnx.save(model, "silent.onnx")
    assert main(["verify", "silent.onnx"]) == 1
    printed = capsys.readouterr()
    assert "0.weight" in printed.out + printed.err
    assert main(["verify", "silent.onnx", "--allow-dense", "0.weight", "2.weight"]) == 0


def test_what_onnx_calls_things(file, capsys):
    asked = ["--opset", "20", "--input-names", "pixels", "--output-names", "logits", "--linear", "Gemm"]
    made = ["--model", "made:network", "--input", "2x3x16"]
    assert main(["export", "net.safetensors", "--out", "net.onnx", *asked, *made]) == 0
    written = onnx.load("net.onnx")
    assert [each.name for each in (*written.graph.input, *written.graph.output)] == ["pixels", "logits"]
    assert [each.version for each in written.opset_import if not each.domain] == [20]
    assert "MatMul" not in {node.op_type for node in written.graph.node}
    capsys.readouterr()
    assert main(["export", "net.safetensors", "--out", "net.pt2", *asked, *made]) == 2
    assert "--opset is for ONNX, and net.pt2 becomes torch; leave it out" in capsys.readouterr().err


def sparsified() -> nn.Module:
    model = network()
    ow.sparsify(model, "2:4", ow.SRSTE())
    return model


def deployed() -> nn.Module:
    model = network()
    ow.project(model, "2:4")
    return ow.deploy(model, torch.randn(2, 16), pattern="2:4")


@pytest.mark.parametrize("make", [sparsified, deployed])
@pytest.mark.filterwarnings("ignore:sparse is not faster")
def test_dense_of_a_model_is_what_it_multiplies_by(file, monkeypatch, make):
    monkeypatch.setattr(sys.modules["made"], "network", make)
    assert main(["export", "made:network", "--out", "dense.safetensors"]) == 0
    found = load_file("dense.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items() if tensor.ndim > 1} == {
        "0.weight": (8, 16),
        "2.weight": (4, 8),
    }
    assert ((found["0.weight"].reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_dense_needs_no_input(file):
    assert main(["export", "net.safetensors", "--model", "made:network", "--out", "dense.safetensors"]) == 0
    assert torch.equal(load_file("dense.safetensors")["0.weight"], file[0].weight)


def test_dense_of_a_model_of_torchvision(file):
    pytest.importorskip("torchvision")
    assert main(["export", "squeezenet1_1", "--out", "dense.safetensors"]) == 0
    assert load_file("dense.safetensors")["classifier.1.weight"].shape == (1000, 512, 1, 1)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_dense_of_what_no_file_holds_is_one_line(file, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["made"], "network", lambda: nn.Linear(4, 4).to(torch.complex128))
    assert main(["export", "made:network", "--out", "dense.safetensors"]) == 2
    assert "is torch.complex128" in capsys.readouterr().err


def test_dense_needs_no_network(file, capsys):
    assert main(["export", "net.safetensors", "--out", "dense.safetensors"]) == 0
    assert "4 dense tensors" in capsys.readouterr().out
    found = load_file("dense.safetensors")
    assert all(torch.equal(each, found[name]) for name, each in file.state_dict().items())


def test_a_program_and_a_folder(file, capsys):
    assert main(["export", "net.safetensors", "--out", "net.pt2", *GIVEN]) == 0
    assert "largest difference 0.0e+00" in capsys.readouterr().out
    x = torch.randn(2, 16)
    assert torch.equal(torch.export.load("net.pt2").module()(x), file(x))
    assert main(["export", "net.safetensors", "--out", "folder", *GIVEN]) == 0
    assert "## N:M sparsity" in capsys.readouterr().out
    assert torch.equal(ow.load_state_dict("folder")["0.weight"], file[0].weight)


def test_aot_is_asked_for_by_name(file, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(exporting.to, "to_aot_inductor", lambda *given, **more: asked.append((given, more)) or 0.0)
    assert main(["export", "net.safetensors", "--out", "net.pt2", "--to", "aot", *GIVEN]) == 0
    ((model, example, out), more) = asked[0]
    assert torch.equal(model[0].weight, file[0].weight)
    assert (tuple(example.shape), out, more) == ((2, 16), "net.pt2", {"dynamic_shapes": None})


@pytest.mark.slow
def test_a_run_knows_its_network(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = ["--epochs", "1", "--warmup", "0.1", "--limit", "128", "--progress", "false", "--model", "resnet8"]
    assert main(["train", "classification", "--out", run, "--quiet", *flags]) == 0
    assert main(["export", run, "--out", str(tmp_path / "net.onnx"), "--dynamic-batch"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "net.onnx")]) == 0
    assert "verified: 9 of 10 matmuls" in capsys.readouterr().out
    assert main(["export", run, "--out", str(tmp_path / "dense.safetensors")]) == 0
    assert main(["export", run, "--out", str(tmp_path / "folder")]) == 0
    assert "| method | sr-ste |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["net.safetensors", "--out", "net.tflite"],
            "say the form by its suffix; add --to {onnx,onnxruntime,torch,aot",
        ),
        (
            ["net.safetensors", "--out", "net.onnx"],
            "is weights and no model: add --model MODULE:FACTORY",
        ),
        (["net.safetensors", "--out", "net.onnx", "--model", "made:network"], "what its input is: add --input SHAPE"),
        (["net.safetensors", "--out", "o.onnx", "--model", "made", "--input", "1"], "needed package.module:factory"),
        (["net.safetensors", "--out", "o.onnx", "--model", "made:nothing", "--input", "1"], "--model made:nothing: "),
        (["net.safetensors", "--out", "o.onnx", "--model", "made:number", "--input", "1"], "gives a int; needed an nn"),
        (
            ["net.safetensors", "--out", "o.onnx", "--model", "made:network", "--input", "2,16"],
            "--input 2,16: needed sizes with 'x' between them",
        ),
        (["missing.safetensors", "--out", "dense.safetensors"], "No such file"),
    ],
)
def test_mistakes_get_one_line(file, words, message, capsys):
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_extra_is_named(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["verify", "net.onnx"]) == 2
    assert "onnx is not installed; this needs the extra: pip install 'openwork[export]'" in capsys.readouterr().err
