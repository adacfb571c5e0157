"""Networks in int8 from layer to layer in ONNX files: the outputs of `ow.deploy`, bytes between layers, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_times import say
from int8_nets import IMAGES, PATTERNS, TOKENS, Encoder, ResNet, network
from torch import nn

import openwork as ow
import openwork.kernels as kernels
from openwork.cli.main import main
from openwork.kernels.cpu import native, onnxruntime_operators

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from one_operator import session  # noqa: E402

from openwork.export import check_onnx, to_onnx  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.skipif(
        not onnxruntime_operators._FILE.exists() or not kernels.vectors().dot_product,
        reason="needs the library of operators, and AVX-512 with VBMI and VNNI",
    ),
]
BATCH = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}


@pytest.fixture(autouse=True)
def int8_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, int8=0.1, sparse=0.5, dot_product=0.1, bytes=0.5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Any]:
    """A network, its file, whose batch may vary, and what `to_onnx` said. Nobody changes them."""
    model, path = network(ResNet), tmp_path_factory.mktemp("net") / "net.onnx"
    with pytest.MonkeyPatch.context() as patch:
        say(patch, int8=0.1, bytes=0.5)
        return model, path, written(model, path, **BATCH)


def options(example: Any, pattern: Any) -> dict[str, Any]:
    return {"pattern": pattern, "weight_dtype": torch.int8, "calibrate": [example]}


def written(model: nn.Module, path: Path, example: Any = IMAGES, pattern: Any = PATTERNS, **more: Any) -> Any:
    return to_onnx(model, example, path, **{"operators": "openwork", **options(example, pattern), **more})


def ran(path: Path, example: Any, threads: int = 1) -> torch.Tensor:
    given = example if isinstance(example, Mapping) else {"x": example}
    feed = {name: each.numpy() for name, each in given.items()}
    return torch.from_numpy(session(path.read_bytes(), threads).run(None, feed)[0])


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def deployed(model: nn.Module, example: Any, pattern: Any) -> Any:
    return ow.deploy(model, example, engine_seconds=0, **options(example, pattern))


@torch.no_grad()
def test_a_network_gives_the_outputs_of_deploy_bit_for_bit(exported) -> None:
    model, path, done = exported
    fast = deployed(model, IMAGES, PATTERNS)  # and the model is as it was
    assert fast.deployment.returned == "int8 network"
    assert done.network.errors == fast.deployment.network.errors
    for x in (IMAGES, torch.randn(5, 3, 12, 12), IMAGES[:1]):
        for threads in (1, 3):
            assert torch.equal(ran(path, x, threads), fast(x))
    assert operators(path) == [
        *("QuantizeLinear", "Transpose"),
        *["QSparseConv2d"] * 5,
        *("QSparseConv2dToFloat", "Transpose", "ReduceMean", "QuantizeLinear", "QSparseLinearToFloat"),
    ]


@torch.no_grad()
def test_an_encoder_gives_the_outputs_of_deploy(tmp_path: Path) -> None:
    model, path = network(Encoder), tmp_path / "net.onnx"
    done = written(model, path, TOKENS, "2:4")
    fast = deployed(model, TOKENS, "2:4")
    torch.testing.assert_close(ran(path, TOKENS), fast(**TOKENS)["y"], rtol=1e-5, atol=1e-5)
    found = operators(path)
    assert [found.count(name) for name in ("QSparseLinear", "QSparseLinearToFloat", "QuantizeLinear")] == [1, 3, 2]
    assert not {"Gelu", "Erf"} & {*found}  # in the product
    assert 1e-4 < done.difference < 0.05


class Mixed(nn.Module):
    """A layer of whose inputs some are a thousand times others, and what reads the bytes of another as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.first.weight.data[:, :4] /= 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu())
        return self.last(y).relu() * y.tanh()


@torch.no_grad()
def test_what_stays_float32_is_sparse_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path, x = Mixed().eval(), tmp_path / "net.onnx", torch.randn(20, 64)
    x[:, :4] *= 1000
    ow.project(model, "2:4")
    done = written(model, path, x, "2:4", **BATCH)
    assert list(done.network.float32) == ["first"]
    assert {each.name: (each.op, each.dtype) for each in done.matmuls} == {
        "first.weight": ("SparseLinear", "float32"),
        "second.weight": ("QSparseLinear", "int8"),
        "last.weight": ("QSparseLinearToFloat", "int8"),
    }
    assert operators(path).count("DequantizeLinear") == 1
    torch.testing.assert_close(ran(path, x), deployed(model, x, "2:4")(x), rtol=1e-4, atol=1e-4)


def test_the_file_is_verified_and_small(exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path, done = exported
    found = {each.name: (str(each.pattern), each.recorded) for each in done.matmuls}
    assert found.pop("stem.weight") == ("None", False)
    assert set(found.values()) == {("2:4", True)}
    names = {each.name for each in onnx.load(path).graph.initializer}
    assert {"blocks.0.conv1.weight.values", "head.weight.indices", "head.bias"} <= names
    assert "pip install openwork" in onnx.load(path).graph.node[2].doc_string
    assert done.nbytes < 0.5 * sum(each.numel() for each in model.parameters()) * 4
    assert main(["verify", str(path)]) == 0
    assert "6 of 7 matmuls held" in capsys.readouterr().out
    file = onnx.load(path)
    indices = next(each for each in file.graph.initializer if each.name == "head.weight.indices")
    indices.raw_data = b"\0" * len(indices.raw_data)
    path = tmp_path / "net.onnx"
    onnx.save(file, path)
    with pytest.raises(ValueError, match=r"head\.weight of QSparseLinearToFloat is damaged"):
        check_onnx(path)
    with pytest.raises(Exception, match="the file is damaged"):
        session(path.read_bytes())


def test_what_cannot_be_is_an_error(tmp_path: Path) -> None:
    model, path = network(ResNet), tmp_path / "net.onnx"
    for changed, message in (
        ({"weight_dtype": torch.float32}, "calibrate is for weight_dtype=torch.int8"),
        ({"operators": "standard"}, "int8 with operators='openwork'"),
        ({"calibrate": []}, "at least one"),
        ({"calibrate": [torch.randn(2, 5, 12, 12)]}, "a batch does not fit the example"),
    ):
        with pytest.raises(ValueError, match=message):
            written(model, path, **changed)
    assert not list(tmp_path.iterdir())


def test_where_no_layer_is_for_bytes_each_quantizes_what_comes(tmp_path: Path) -> None:
    model, path, x = nn.Sequential(nn.Linear(64, 8)).eval(), tmp_path / "net.onnx", torch.randn(2, 64)
    ow.project(model, "2:4")
    before = native.isa()
    assert before is not None
    kernels.use_isa("avx2")
    try:
        with pytest.warns(UserWarning, match="no int8 network, layer by layer instead: .*this CPU has no dot products"):
            done = written(model, path, x, "2:4")
    finally:
        kernels.use_isa(before.name)
    assert "this CPU has no dot products" in done.network.reason
    assert operators(path) == ["SparseLinear"]
    assert [each.dtype for each in done.matmuls] == ["int8"]


def test_a_model_in_training_is_written_as_finalized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    ow.sparsify(model, "2:4", ow.SRSTE())
    x = torch.randn(20, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = written(model, tmp_path / "net.onnx", x, None)
    assert [each.op for each in done.matmuls] == ["QSparseLinear", "QSparseLinearToFloat"]
    assert model.training


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.last = nn.Conv2d(8, 64, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(64, 64, 1)
        self.average, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.average(self.last(self.pool(self.conv(x).relu()))).flatten(1))


@torch.no_grad()
def test_pooled_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path, x = Pooled().eval(), tmp_path / "net.onnx", torch.randn(2, 8, 9, 9)
    ow.project(model, "2:4")
    written(model, path, x, "2:4", **BATCH)
    fast = deployed(model, x, "2:4")
    for each in (x, torch.randn(3, 8, 9, 9)):
        torch.testing.assert_close(ran(path, each), fast(each), rtol=1e-3, atol=1e-3)
    assert not {"Gather", "ScatterND", "Range", "MaxPool"} & {*operators(path)}
    assert operators(path).count("NhwcMaxPool") == 1


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "int8_command.py").write_text(
        "import torch, openwork as ow\ndef network():\n    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(64, 8)).eval()\n    ow.project(model, '2:4')\n"
        "    return model\n"
    )
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["export", "int8_command:network", "--input", "1x64", "--out", "net.onnx", "--pattern", "2:4"]
    words += ["--to", "onnxruntime", "--calibrate", "samples.npy"]
    assert main([*words, "--weight-dtype", "int8"]) == 0
    out = capsys.readouterr().out
    assert "int8 network: 1 of 1 layer on bytes" in out
    assert operators(tmp_path / "net.onnx") == ["QuantizeLinear", "QSparseLinearToFloat"]
    assert main(words) != 0
    assert "--weight-dtype int8" in capsys.readouterr().err


_ALONE = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession("net.onnx", options, providers=["CPUExecutionProvider"])
numpy.save("y.npy", session.run(None, {"x": numpy.load("x.npy")})[0])
assert not {"torch", "openwork"} & set(sys.modules)
"""


def test_a_process_with_onnxruntime_alone(exported, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(exported[1].read_bytes())
    np.save(tmp_path / "x.npy", IMAGES.numpy())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", _ALONE, ow.onnxruntime_library()]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=120)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "y.npy")), ran(exported[1], IMAGES))
