"""ONNX files with operators of ours: compressed weights, verified, and the outputs of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.kernels.cpu import onnxruntime_operators

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from openwork.export import check_onnx, to_onnx  # noqa: E402
from openwork.export.onnx import Exported  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.skipif(not onnxruntime_operators._FILE.exists(), reason="needs the library of operators"),
]


class Net(nn.Module):
    """Convolutions with normalization, attention, a linear layer with ReLU, one without bias, one that is dense."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, (1, 3), padding=(0, 1), groups=2)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.fc, self.head = nn.Linear(32, 64), nn.Linear(64, 12, bias=False)
        self.dense = nn.Linear(12, 3)
        self.bn.weight.data = torch.randn(16)  # also negative: zeros that it scales become -0.0

    def forward(self, x):
        h = self.grouped(self.bn(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        h = self.head(self.fc(self.encoder(h)).relu())
        return self.dense(h.mean(1)), h


CHOICE = ow.Selection("2:4", exclude=["dense"])


def network() -> nn.Module:
    model = Net().eval()
    ow.project(model, CHOICE)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, Path, Exported]:
    """A network, its file, whose batch may vary, and what `to_onnx` said. Nobody changes them."""
    model, path = network(), tmp_path_factory.mktemp("net") / "net.onnx"
    shapes = {"x": {0: torch.export.Dim("batch")}}
    return model, path, to_onnx(model, images(2), path, pattern=CHOICE, dynamic_shapes=shapes, operators="openwork")


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 8, 8, 6)


def session(path: Path) -> object:
    options = runtime.SessionOptions()
    options.register_custom_ops_library(ow.onnxruntime_library())
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operators(path: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(path).graph.node if node.domain == "openwork")


def test_a_network(exported):
    model, path, done = exported
    assert done.difference < 1e-5
    assert done.nbytes == path.stat().st_size
    assert operators(path) == ["AddLayerNormalization"] * 2 + ["SparseConv2d"] * 2 + ["SparseLinear"] * 6
    found = {each.name: (each.op, str(each.pattern), each.recorded) for each in done.matmuls}
    assert found["conv.weight"] == ("SparseConv2d", "2:4", True)
    assert found["fc.weight"] == ("SparseLinear", "2:4", True)
    assert found["dense.weight"][1:] == ("None", False)
    names = {each.name for each in onnx.load(path).graph.initializer}
    assert {"conv.weight.values", "fc.weight.indices"} <= names
    assert not {"conv.weight", "fc.weight"} & names
    for batch in (1, 5):
        x = images(batch)
        for mine, expected in zip(session(path).run(None, {"x": x.numpy()}), model(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), expected, atol=1e-4, rtol=1e-4)
    relus = [node.op_type for node in onnx.load(path).graph.node].count("Relu")
    assert relus == 0  # all in our operators


class Residual(nn.Module):
    """Sums of convolutions: with what is as large, with what is broadcast, of one used twice, of two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))

    def forward(self, x):
        x = (self.a(x) + x).relu()
        x = self.b(x) + x.mean((2, 3), keepdim=True)
        y = self.c(x)
        x = y + x
        return (self.d(x) + self.e(x)).relu() + y


def test_residual_connections(tmp_path: Path):
    model, path = Residual().eval(), tmp_path / "net.onnx"
    ow.project(model, "1:4")
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height")},)
    x = torch.randn(2, 8, 9, 7)
    assert to_onnx(model, x, path, pattern="1:4", operators="openwork", dynamic_shapes=shapes).difference < 1e-5
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in ("SparseConv2d", "Add", "Relu")]
    assert [node.op_type for node in nodes].count("Relu") == 0
    with_sum = [node.input[1].split(".")[0] for node in nodes if len(node.input) == 6]
    assert with_sum in (["a", "d"], ["a", "e"])
    x = torch.randn(3, 8, 5, 7)
    y = torch.from_numpy(session(path).run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


class Norms(nn.Module):
    """Normalized sums: alone, before a residual connection, of other shapes, not over the last dim, of a constant."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 40)
        self.a, self.b, self.c, self.d = (nn.LayerNorm(40) for _ in range(4))
        self.e, self.f = nn.LayerNorm([3, 40]), nn.LayerNorm(40, bias=False)
        self.table = nn.Parameter(torch.randn(1, 3, 40))

    def forward(self, x):
        x = self.a(self.fc(x) + x)
        x = x + torch.tanh(x)
        x = x + self.b(x)
        x = self.c(x + x.mean(1, keepdim=True)) * self.d(self.table + x)
        return self.e(x + torch.exp(-x)), self.f(x + x.sin())


def test_normalized_sums(tmp_path: Path):
    model, path = Norms().eval(), tmp_path / "net.onnx"
    model.a.weight.data, model.b.bias.data, model.f.weight.data = torch.randn(3, 40)
    ow.project(model, "2:4", exclude=["table"])
    shapes = ({0: torch.export.Dim("batch")},)
    choice = ow.Selection("2:4", exclude=["table"])
    done = to_onnx(model, torch.randn(2, 3, 40), path, pattern=choice, operators="openwork", dynamic_shapes=shapes)
    assert done.difference < 1e-5
    nodes = list(onnx.load(path).graph.node)
    ours = [
        (node.input[2].split(".")[0], len(node.output)) for node in nodes if node.op_type == "AddLayerNormalization"
    ]
    assert ours == [("a", 1), ("b", 2), ("f", 1)]
    assert [node.op_type for node in nodes].count("LayerNormalization") == 3
    x = torch.randn(5, 3, 40)
    for found, expected in zip(session(path).run(None, {"x": x.numpy()}), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_int8(tmp_path: Path):
    model, path = network(), tmp_path / "net.onnx"
    done = to_onnx(model, images(2), path, pattern=CHOICE, operators="openwork", weight_dtype=torch.int8)
    assert 1e-4 < done.difference < 0.1
    assert {each.dtype for each in done.matmuls if each.recorded} == {"int8"}
    assert "fc.weight.scales" in {each.name for each in onnx.load(path).graph.initializer}
    with pytest.raises(ValueError, match="int8 with operators='openwork'"):
        to_onnx(model, images(2), path, pattern=CHOICE, weight_dtype=torch.int8)


def test_without_the_library_a_small_file_says_what_to_install(tmp_path: Path):
    path = tmp_path / "net.onnx"
    model = nn.Sequential(nn.Linear(256, 256)).eval()
    ow.project(model, "1:4")
    done = to_onnx(model, torch.randn(2, 256), path, pattern="1:4", operators="openwork")
    assert done.nbytes < 0.3 * 256 * 256 * 4
    with pytest.raises(Exception, match=r"openwork.*SparseLinear"):
        runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    file = onnx.load(path)
    metadata = {each.key: each.value for each in file.metadata_props}
    assert "pip install openwork" in file.doc_string
    assert "openwork.onnxruntime_library()" in metadata["openwork_operators"]
    assert "pip install openwork" in file.graph.node[0].doc_string


def test_nothing_sparse_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing would be sparse"), pytest.warns(match="no pattern was given"):
        to_onnx(nn.Linear(16, 8), torch.randn(2, 16), tmp_path / "net.onnx", operators="openwork")
    with pytest.raises(ValueError, match="operators has to be 'standard' or 'openwork'"):
        to_onnx(nn.Linear(16, 8), torch.randn(2, 16), tmp_path / "net.onnx", operators="ours")
    assert not list(tmp_path.iterdir())


def test_verify_reads_compressed_weights(exported, tmp_path: Path, capsys):
    path = tmp_path / "net.onnx"
    path.write_bytes(exported[1].read_bytes())
    assert main(["verify", str(path)]) == 0
    assert "verified: 8 of 9 matmuls held" in capsys.readouterr().out
    assert main(["verify", str(path), "--pattern", "1:4"]) != 0
    file = onnx.load(path)
    indices = next(each for each in file.graph.initializer if each.name == "fc.weight.indices")
    indices.raw_data = b"\0" * len(indices.raw_data)
    onnx.save(file, path)
    with pytest.raises(ValueError, match=r"fc\.weight of SparseLinear is damaged"):
        check_onnx(path)


def test_the_command_line(tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "sparse_net.py").write_text(
        "import torch, openwork as ow\ndef network():\n    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(16, 8)).eval()\n    ow.project(model, '2:4')\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["sparse_net:network", "--input", "1x16", "--out", "net.onnx", "--pattern", "2:4"]
    assert main(["export", *words, "--to", "onnxruntime", "--dynamic-batch"]) == 0
    out = capsys.readouterr().out
    assert "SparseLinear" in out
    assert "MB; it needs a library" in out
    assert "register_custom_ops_library(openwork.onnxruntime_library())" in out
    assert operators(tmp_path / "net.onnx") == ["SparseLinear"]


_ALONE = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession("net.onnx", options, providers=["CPUExecutionProvider"])
numpy.save("y.npy", session.run(None, {"x": numpy.load("x.npy")})[1])
assert not {"torch", "openwork"} & set(sys.modules)
"""


def test_a_process_with_onnxruntime_alone(exported, tmp_path: Path):
    model, x = exported[0], images(2)
    (tmp_path / "net.onnx").write_bytes(exported[1].read_bytes())
    np.save(tmp_path / "x.npy", x.numpy())
    library = ow.onnxruntime_library()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", _ALONE, library]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=120)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), model(x)[1], atol=1e-4, rtol=1e-4)
