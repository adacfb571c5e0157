"""`openwork verify` called a 2:4 file denser than it records once ONNX Runtime had quantized it, and passed files with
dense weights behind operators that it did not follow. A weight that equals its zero point is a zero, what is computed
from constants is a constant, and a constant that meets an unknown operator is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.export import check_onnx, to_onnx

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
quantization = pytest.importorskip("onnxruntime.quantization")
Node = helper.make_node


class Layers(nn.Module):
    """A product of each kind that ONNX Runtime quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 12)
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.fc(self.conv(x).relu().flatten(2).transpose(1, 2)))[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 model with a dense head, as `to_onnx` writes it."""
    torch.manual_seed(0)
    model, path = Layers().eval(), tmp_path_factory.mktemp("exported") / "net.onnx"
    ow.sparsify(model, "2:4", exclude=["head"])
    with pytest.warns(UserWarning, match="the exporter rewrote"):
        to_onnx(model, torch.randn(2, 8, 6, 6), path)
    return path


class Samples(quantization.CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self.rest = [{name: np.random.default_rng(i).standard_normal((2, 8, 6, 6), np.float32)} for i in range(2)]

    def get_next(self):
        return self.rest.pop() if self.rest else None


KINDS = ["dynamic", "QDQ", "QOperator"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weights", ["QInt8", "QUInt8"])
def test_what_onnx_runtime_quantizes_stays_as_it_was_recorded(exported, tmp_path, capsys, kind, per_channel, weights):
    path = quantized(exported, tmp_path, kind, per_channel, weights)
    found = {each.name: each for each in check_onnx(path)}
    held = {name.partition(".")[0] for name, each in found.items() if each.recorded}
    assert held == {"conv", "fc"}
    assert all(str(each.pattern) == "2:4" for each in found.values() if not each.name.startswith("head"))
    assert len(found) == 5
    assert main(["verify", str(path)]) == 0
    assert "verified: 2 of 5 matmuls held to what was recorded" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_weight_that_is_denser_is_found(exported, tmp_path, kind):
    path = quantized(exported, tmp_path, kind, True, "QUInt8")
    model = onnx.load(path)
    (weight,) = [each for each in model.graph.initializer if each.name.startswith("fc.weight") and len(each.dims) == 2]
    weight.raw_data = np.random.default_rng(0).integers(1, 100, tuple(weight.dims), np.uint8).tobytes()
    onnx.save(model, path)
    with pytest.raises(ow.NotSparse, match=r"^1 weight is denser.*\n  fc\.weight: "):
        check_onnx(path)


def quantized(exported: Path, folder: Path, kind: str, per_channel: bool, weights: str) -> Path:
    """A zero point other than 0 wherever the type of the weights is unsigned."""
    path, types = folder / "int8.onnx", quantization.QuantType
    choices = {"per_channel": per_channel, "weight_type": getattr(types, weights)}
    if kind == "dynamic":
        quantization.quantize_dynamic(exported, path, **choices)
        return path
    quantization.quantize_static(
        exported,
        path,
        Samples(onnx.load(exported).graph.input[0].name),
        quant_format=getattr(quantization.QuantFormat, kind),
        activation_type=types.QUInt8,
        **choices,
    )
    return path


# Files of anyone: a 2:4 weight that the file records or not, and something else beside it


def two_four(outs: int = 8) -> np.ndarray:
    weight = torch.randn(outs, 8)
    return ow.topn(weight.abs(), ow.Pattern(2, 4)).mul(weight).numpy()


DENSE = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
FUNCTION = helper.make_function(
    "f", "Fn", ["a", "b"], ["c"], [Node("MatMul", ["a", "b"], ["c"])], [helper.make_opsetid("", 20)]
)


def info(name: str, *shape: int | str):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def written(path: Path, nodes, constants: dict[str, np.ndarray], recorded: str = '{"w": "2:4"}') -> Path:
    """x (2, 8) times the weight w is h, and the nodes make y of it."""
    constants = {"w": np.ascontiguousarray(two_four().T), **constants}
    initializers = [numpy_helper.from_array(each, name) for name, each in constants.items()]
    graph = helper.make_graph(
        [Node("MatMul", ["x", "w"], ["h"]), *nodes], "g", [info("x", 2, 8)], [info("y", "a", "b")], initializers
    )
    domains = [helper.make_opsetid(name, 1) for name in ("com.microsoft", "somebody", "f")]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *domains], functions=[FUNCTION])
    helper.set_model_props(model, {"openwork": recorded} if recorded else {})
    onnx.save(model, path)
    return path


def over_a_stack():
    """A loop over a stack of weights: in its body they are inputs."""
    nodes = [Node("MatMul", ["state", "each"], ["next"]), Node("Identity", ["next"], ["out"])]
    inputs, outputs = [info("state", 2, 8), info("each", 8, 8)], [info("next", 2, 8), info("out", 2, 8)]
    return Node(
        "Scan", ["h", "d"], ["y", "all"], body=helper.make_graph(nodes, "b", inputs, outputs), num_scan_inputs=1
    )


MEAN = Node("ReduceMean", ["x"], ["m"], keepdims=0)
BESIDE = {
    "matmul": ([Node("MatMul", ["h", "d"], ["y"])], {}),
    "reshaped": ([Node("Reshape", ["d", "s"], ["e"]), Node("MatMul", ["h", "e"], ["y"])], {"s": np.array([8, 8])}),
    "computed": ([Node("Mul", ["d", "d"], ["e"]), Node("MatMul", ["h", "e"], ["y"])], {}),
    "joined": ([Node("Concat", ["d", "w"], ["e"], axis=1), Node("MatMul", ["h", "e"], ["y"])], {}),
    "einsum": ([Node("Einsum", ["h", "d"], ["y"], equation="bi,oi->bo")], {}),
    "einsum without an output": ([Node("Einsum", ["h", "d"], ["y"], equation="bi,oi")], {}),
    "fused": ([Node("FusedMatMul", ["h", "d"], ["y"], domain="com.microsoft", transB=1)], {}),
    "function": ([Node("Fn", ["h", "d"], ["y"], domain="f")], {}),
    "scaled by data": ([MEAN, Node("Mul", ["d", "m"], ["e"]), Node("MatMul", ["h", "e"], ["y"])], {}),
}
UNKNOWN = {
    "somebody's operator": ([Node("Mine", ["h", "d"], ["y"], domain="somebody")], {}),
    "4-bit": (
        [Node("MatMulNBits", ["h", "d", "s"], ["y"], domain="com.microsoft", K=8, N=8, bits=4, block_size=16)],
        {"d": np.full((8, 1, 8), 33, np.uint8), "s": np.ones(8, np.float32)},
    ),
    "loop": ([over_a_stack()], {"d": np.stack([DENSE] * 3)}),
    "shifted by data": ([MEAN, Node("Add", ["d", "m"], ["e"]), Node("MatMul", ["h", "e"], ["y"])], {}),
    "one by one and summed": (
        [
            Node("Unsqueeze", ["h", "one"], ["u"]),
            Node("Mul", ["u", "d"], ["p"]),
            Node("ReduceSum", ["p", "two"], ["y"], keepdims=0),
        ],
        {"one": np.array([1]), "two": np.array([2])},
    ),
}


@pytest.mark.parametrize(("nodes", "constants"), [*BESIDE.values(), *UNKNOWN.values()], ids=[*BESIDE, *UNKNOWN])
@pytest.mark.parametrize("recorded", ['{"w": "2:4"}', ""], ids=["recorded", "nothing recorded"])
def test_a_dense_constant_is_not_accounted_for_unless_it_is_allowed(tmp_path, capsys, nodes, constants, recorded):
    path = written(tmp_path / "net.onnx", nodes, {"d": DENSE, **constants}, recorded)
    assert main(["verify", str(path)]) != 0
    said = "".join(capsys.readouterr())
    assert " d" in said
    assert main(["verify", str(path), "--allow-dense", "d"]) == 0
    assert "d (allowed by 'd')" in capsys.readouterr().out
    assert main(["verify", str(path), "--pattern", "2:4"]) != 0
    assert main(["verify", str(path), "--pattern", "2:4", "--exclude", "d"]) == 0
    assert "verified: 1 of 2 matmuls held to what was asked" in capsys.readouterr().out


@pytest.mark.parametrize("use", ["the other axis", "times a rotation"])
def test_a_recorded_weight_that_is_multiplied_dense_as_well_is_found(tmp_path, use):
    nodes = {
        "the other axis": [Node("Gemm", ["h", "w"], ["y"], transB=1)],
        "times a rotation": [Node("MatMul", ["w", "d"], ["e"]), Node("MatMul", ["h", "e"], ["y"])],
    }
    path = written(tmp_path / "net.onnx", nodes[use], {"d": DENSE} if use != "the other axis" else {})
    with pytest.raises(ow.NotSparse, match=r"^1 product is not accounted for:\n  w: multiplied along another") as error:
        check_onnx(path)
    assert error.value.unaccounted == {"w"}
    assert sum(each.recorded for each in check_onnx(path, allow_dense=["w"])) == 1


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([Node("Add", ["h", "d"], ["y"])], {"d": DENSE[:2]}),
        ([Node("Mul", ["h", "d"], ["e"]), Node("ReduceSum", ["e"], ["y"])], {"d": DENSE[:2]}),
        ([MEAN, Node("Mul", ["w", "m"], ["e"]), Node("MatMul", ["h", "e"], ["y"])], {}),
        ([Node("MatMul", ["h", "d"], ["y"])], {"d": np.ascontiguousarray(two_four().T)}),
        ([Node("Slice", ["h", "a", "b", "c"], ["e"]), Node("MatMul", ["e", "d"], ["y"])], {
            "d": DENSE[:3], "a": np.array([0]), "b": np.array([3]), "c": np.array([1])
        }),
    ],
    ids=["added", "scaled one by one", "sparse and scaled by data", "as sparse", "3 inputs"],
)  # fmt: skip
def test_what_is_no_dense_product_is_no_alarm(tmp_path, nodes, constants):
    check_onnx(written(tmp_path / "net.onnx", nodes, constants))


def test_a_file_of_which_nothing_is_multiplied_is_not_verified(tmp_path, capsys):
    graph = helper.make_graph([Node("Relu", ["x"], ["y"])], "g", [info("x", 2, 8)], [info("y", 2, 8)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "net.onnx")
    assert main(["verify", str(tmp_path / "net.onnx")]) == 1
    assert "nothing verified" in capsys.readouterr().out


def test_what_was_left_dense_is_recorded_by_the_export(exported, capsys):
    assert main(["verify", str(exported)]) == 0
    printed = capsys.readouterr().out
    assert "not held, and dense or denser: head.weight (recorded as dense)\n" in printed
