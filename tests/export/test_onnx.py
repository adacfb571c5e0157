"""ONNX files: zeros where the patterns say, matmuls where TensorRT looks, outputs that ONNX Runtime agrees with."""

from __future__ import annotations

import os
import re
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.export import Dim

import openwork as ow
from openwork.cli.main import main
from openwork.export import check_onnx, to_onnx
from openwork.export import onnx as exporting
from openwork.export.outputs import check_equal
from openwork.inference.layers import PackedLinear
from openwork.layouts import Gemm

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Net(nn.Module):
    """Every way to a matmul that a linear layer takes: 2 and 3 dims, one weight twice, attention, no bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 12, bias=False)

    def forward(self, x):
        h = self.bn(self.conv(x)).relu().flatten(2).transpose(1, 2)
        h = self.encoder(self.fc(h))
        return self.head(h.mean(1)), self.head(h)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.onnx"


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 8, 4, 4)


def ran(path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, feed)]


def constants(path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


WEIGHTS = ["conv", "fc", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "head"]
WEIGHTS = [f"{name}.weight" for name in WEIGHTS] + ["encoder.self_attn.in_proj_weight"]


@pytest.mark.parametrize("linear", ["MatMul", "Gemm"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network(path, dynamic, linear):
    model = Net().eval()
    ow.project(model, "2:4")
    shapes = {"x": {0: Dim("batch")}} if dynamic else None
    done = to_onnx(model, images(), path, pattern="2:4", dynamic_shapes=shapes, linear=linear)

    onnx.checker.check_model(path, full_check=True)
    assert done.difference < 1e-5
    # Rows of attention are put together before its projections: matmuls on two dims, Gemm in either case.
    two_dims = {"encoder.self_attn.out_proj.weight", "conv.weight"}
    assert {each.name: (str(each.pattern), each.recorded) for each in done.matmuls} == dict.fromkeys(
        WEIGHTS, ("2:4", True)
    )
    assert {(each.name in two_dims, each.op) for each in done.matmuls if each.name != "head.weight"} == {
        (True, "Conv"),
        (True, "Gemm"),
        (False, linear),
    }
    assert {each.op for each in done.matmuls if each.name == "head.weight"} == {"Gemm", linear}
    assert check_onnx(path) == done.matmuls
    found = constants(path)
    stored = sum(array.size for array in found.values() if array.ndim >= 2)
    assert stored == sum(model.state_dict()[name].numel() for name in WEIGHTS)  # none of them twice
    for name in WEIGHTS[1:]:  # conv.weight is scaled by the BatchNorm that was folded into it
        written = model.state_dict()[name].numpy()
        is_transposed = linear == "MatMul" and name not in two_dims
        assert np.array_equal(found[name], written.T if is_transposed else written)
    assert np.array_equal(found["conv.weight"] != 0, model.conv.weight.detach().numpy() != 0)
    x = images(5 if dynamic else 2)
    for mine, theirs in zip(ran(path, x), model(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_sparsified_model_is_exported_as_finalized_and_left_alone(path):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).train()
    ow.sparsify(model, {"0": "1:4", "2": "2:8"})
    before = {name: each.clone() for name, each in model.named_parameters()}
    x = torch.randn(3, 16)
    done = to_onnx(model, x, path)
    assert {each.name: str(each.pattern) for each in done.matmuls} == {"0.weight": "1:4", "2.weight": "2:8"}
    torch.testing.assert_close(ran(path, x)[0], model(x))
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert model.training
    assert ow.masks(model).keys() == {"0.weight", "2.weight"}


def test_keyword_arguments_and_their_order(path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, a, b, scale=1.0):
            return self.fc(a) - scale * b

    model = Two()
    ow.project(model, "2:4")
    a, b = torch.randn(2, 8), torch.randn(2, 4)
    to_onnx(model, {"b": b, "scale": 3.0, "a": a}, path, pattern="2:4")
    torch.testing.assert_close(ran(path, a, b)[0], model(a, b, 3.0))
    to_onnx(model, (a, b), path, pattern="2:4")
    torch.testing.assert_close(ran(path, a, b)[0], model(a, b))


class Forms(nn.Module):
    """Products by constants that are no plain linear layers on batches."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.wide, self.experts = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x):
        twice, thrice = x @ self.w, x @ self.w
        one = x[0, 0] @ self.w.T
        return (
            self.b + x @ self.w,
            twice + self.b,
            twice,
            one,
            x @ self.w + self.wide,
            thrice * (thrice + self.b),
            torch.bmm(x, self.experts),
        )


@pytest.mark.parametrize("linear", ["MatMul", "Gemm"])
def test_every_form_of_a_matmul(path, linear):
    model = Forms()
    where = {"w": 0, "experts": 1}
    ow.project(model, "2:4", axis=where, exclude=["wide"])
    x = torch.randn(3, 4, 8)
    done = to_onnx(model, x, path, pattern=ow.Selection({"w": "2:4", "experts": "2:4"}, axis=where), linear=linear)
    assert {each.name for each in done.matmuls if each.recorded} == {"w", "experts"}
    if linear == "Gemm":
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        assert nodes.count("MatMul") == 1  # the batched one
    for mine, theirs in zip(ran(path, x), model(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert {(each.op, each.axis.dim) for each in done.matmuls} == {(linear, 0), ("Gemm", 1), ("MatMul", 1)}


def test_convolutions_of_other_kinds_and_recurrent_layers(path, capsys):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv = nn.ConvTranspose2d(8, 4, 3, groups=2), nn.Conv1d(8, 8, 3)
            self.lstm, self.gru = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 8)

        def forward(self, x, y):
            return self.gru(self.lstm(x)[0])[0], self.up(y), self.conv(x.transpose(1, 2))

    model = Other().eval()
    ow.project(model, "2:4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = to_onnx(model, (torch.randn(2, 5, 8), torch.randn(1, 8, 4, 4)), path, pattern="2:4")
    assert any(
        "rewrote gru.weight_hh_l0" in str(each.message) or "rewrote lstm" in str(each.message) for each in caught
    )
    assert [(each.op, str(each.pattern)) for each in done.matmuls] == [
        (op, "2:4") for op in ("LSTM", "LSTM", "GRU", "GRU", "ConvTranspose", "Conv")
    ]
    assert {each.name for each in done.matmuls if each.recorded} == {"up.weight", "conv.weight"}
    assert main(["verify", str(path)]) == 0
    *table, other, verified, note = capsys.readouterr().out.splitlines()
    assert [line.split()[3:-1] for line in table[1:]] == [
        [op, "2:4", *["(inferred)"] * (op in ("LSTM", "GRU"))]
        for op in ("LSTM", "LSTM", "GRU", "GRU", "ConvTranspose", "Conv")
    ]
    assert other.startswith("not MatMul, Gemm or Conv, so TensorRT takes no sparse tactic: ")
    assert verified == "verified: 2 of 6 matmuls held to what was recorded"
    assert note.startswith(
        "(inferred): from the weights; the file records none (the exporter renames those of LSTM, GRU, RNN)"
    )


def test_a_transformer_of_transformers(path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    ow.project(model, "2:4", exclude=["lm_head", "*wte*", "*wpe*"])
    done = to_onnx(model, {"input_ids": torch.tensor([[3, 1, 2]])}, path, pattern={"*.h.*": "2:4"})
    sparse = {each.name: (each.op, each.axis.dim) for each in done.matmuls if each.recorded}
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sparse == {f"transformer.h.0.{name}.weight": ("Gemm", 0) for name in names}  # Conv1D: (in, out)


def test_a_tied_head_is_stored_once_and_read_as_it_is(path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(32, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.hidden(self.embedding(tokens)))

    model = Tied().eval()
    ow.project(model, "2:4", exclude=["embedding", "head"])
    done = to_onnx(model, torch.tensor([[3, 1, 2]]), path, pattern={"hidden": "2:4"})
    assert {each.name: str(each.pattern) for each in done.matmuls} == {"hidden.weight": "2:4", "head.weight": "None"}
    assert sum(array.size for array in constants(path).values() if array.ndim >= 2) == 32 * 16 + 16 * 16


@pytest.mark.parametrize("linear", ["MatMul", "Gemm"])
def test_operator_set_and_names_are_those_asked_for(path, linear):
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    ow.project(model, "2:4")
    x = torch.randn(2, 3, 16)
    names = {"input_names": ["linear"], "output_names": ["logits"]}  # `linear` is also what torch calls a value
    for opset in (17, 20):
        done = to_onnx(model, x, path, pattern="2:4", opset=opset, linear=linear, **names)
        written = onnx.load(path)
        assert [each.version for each in written.opset_import if not each.domain] == [opset]
        assert {each.name for each in done.matmuls if each.recorded} == {"0.weight", "2.weight"}
        session = onnxruntime.InferenceSession(path)
        assert [each.name for each in session.get_inputs()] == ["linear"]
        torch.testing.assert_close(torch.from_numpy(session.run(["logits"], {"linear": x.numpy()})[0]), model(x))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_names": ["a", "b"]}, "other argument gives, for input; got ['a', 'b']"),
        ({"input_names": "x"}, "input_names has to be 1 different names"),
        ({"output_names": []}, "output_names has to be 1 different names"),
        ({"input_names": ["0.weight"]}, "input_names has to be 1 different names that no weight has"),
        ({"input_names": ["y"], "output_names": ["y"]}, "output_names has to be 1 different names that no weight has"),
        ({"opset": 5}, "opset=5"),
        ({"opset": 1000}, "opset=1000"),
        ({"linear": "gemm"}, "linear has to be 'MatMul' or 'Gemm', not 'gemm'"),
    ],
)
def test_names_and_versions_that_do_not_fit_are_refused(path, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_onnx(nn.Sequential(nn.Linear(16, 8)), torch.randn(3, 16), path, pattern=None, **wrong)
    assert not path.exists()


def test_an_lstm_with_projection_is_written_step_by_step(path):
    model = nn.LSTM(16, 32, num_layers=2, bidirectional=True, proj_size=8, batch_first=True).eval()
    ow.project(model, "2:4")
    x = torch.randn(2, 3, 16)
    with pytest.warns(UserWarning, match="knows no proj_size"):
        done = to_onnx(model, x, path, pattern="2:4", dynamic_shapes=({0: Dim.DYNAMIC},))
    assert {each.name: str(each.pattern) for each in done.matmuls if each.recorded} == {
        name: "2:4" for name, weight in model.named_parameters() if weight.ndim == 2
    }
    x = torch.randn(5, 3, 16)
    torch.testing.assert_close(ran(path, x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_checked_without_being_run(path):
    model = nn.Linear(8, 4, dtype=torch.float16)
    ow.project(model, "2:4")
    done = to_onnx(model, torch.randn(2, 8, dtype=torch.float16), path, pattern="2:4")
    assert [(each.dtype, str(each.pattern)) for each in done.matmuls] == [("float16", "2:4")]


def test_the_file_tells_nothing_of_the_machine(path, tmp_path):
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    to_onnx(model, torch.randn(2, 8), path, pattern="2:4")
    content = path.read_bytes()
    assert b".py" not in content
    assert str(tmp_path).encode() not in content


def two_files(path) -> bytes:
    """What lies in the second file; there is one, of the right name."""
    (data,) = [each for each in path.parent.iterdir() if each != path and not each.name.startswith(".")]
    assert re.fullmatch(r"net\.onnx\.[0-9a-f]{8}\.data", data.name)
    return data.read_bytes()


def test_large_weights_lie_in_a_second_file(path, monkeypatch):
    monkeypatch.setattr(exporting, "_PROTOBUF_LIMIT", 1000)
    model = nn.Linear(64, 64)
    ow.project(model, "2:4")
    to_onnx(model, torch.randn(2, 64), path, pattern="2:4")
    assert model.weight.detach().numpy().tobytes() in two_files(path)
    assert path.stat().st_size < 2000
    x = torch.randn(2, 64)
    torch.testing.assert_close(ran(path, x)[0], model(x))
    assert [str(each.pattern) for each in check_onnx(path)] == ["2:4"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux to see which file is synced")
def test_a_file_and_its_second_file_belong_together_at_every_moment(path, monkeypatch):
    """Looked at where the new file takes its place: before, all is old; after, all is new. The old weights go last."""
    monkeypatch.setattr(exporting, "_PROTOBUF_LIMIT", 1000)
    old, new = nn.Linear(64, 64).eval(), nn.Linear(64, 64).eval()
    x = torch.randn(2, 64)
    for model in (old, new):
        ow.project(model, "2:4")
    seen, synced = [], []
    replace, sync = os.replace, os.fsync

    def moment():
        (found,) = ran(path, x)
        models = {"old": old, "new": new}
        seen.append([name for name, model in models.items() if torch.allclose(found, model(x), atol=1e-4)])

    def watched_replace(source, target):
        ours = str(target) == str(path)  # the libraries rename files of their own
        if ours and path.exists():
            moment()
        replace(source, target)
        if ours:
            moment()

    def watched_sync(file):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        sync(file)

    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "fsync", watched_sync)
    to_onnx(old, x, path, pattern="2:4")
    to_onnx(new, x, path, pattern="2:4")
    assert seen == [["old"], ["old"], ["new"]]
    assert new.weight.detach().numpy().tobytes() in two_files(path)
    assert [name.rpartition(".")[2] for name in synced[-3:]] == ["data", "onnx", path.parent.name]  # then the folder

    monkeypatch.setattr(exporting, "outputs", lambda *_: [torch.zeros(2, 64)])
    with pytest.raises(RuntimeError, match="other outputs"):
        to_onnx(old, x, path, pattern="2:4")
    assert new.weight.detach().numpy().tobytes() in two_files(path)
    monkeypatch.undo()
    to_onnx(new, x, path, pattern="2:4")  # small enough again: one file
    assert [each.name for each in path.parent.iterdir()] == ["net.onnx"]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_denser_model_is_refused_and_the_old_file_stays(path):
    path.write_bytes(b"old")
    with pytest.raises(ow.NotSparse, match=r"weight: 8 of 8 groups hold more than 2 of 4 \(the worst 4\)"):
        to_onnx(nn.Linear(8, 4), torch.randn(2, 8), path, pattern="2:4")
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_deployed_model_is_refused_by_name(path):
    layer = nn.Linear(8, 4)
    ow.project(layer, "2:4")
    model = nn.Sequential(PackedLinear(layer, ow.Pattern(2, 4), Gemm, torch.float32))
    with pytest.raises(
        ValueError, match=r"exporting to ONNX: 1 layer is deployed \(0, \.\.\.\).*the model that was deployed"
    ):
        to_onnx(model, torch.randn(2, 8), path)
    assert not path.exists()


def test_other_outputs_are_refused(path, monkeypatch):
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    monkeypatch.setattr(exporting, "outputs", lambda *_: [torch.zeros(2, 4)])
    with pytest.raises(RuntimeError, match="ONNX Runtime gives other outputs"):
        to_onnx(model, torch.randn(2, 8), path, pattern="2:4")
    assert not path.exists()


def test_without_onnxruntime_it_is_said(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    with pytest.warns(UserWarning, match="onnxruntime is not installed"):
        assert to_onnx(model, torch.randn(2, 8), path, pattern="2:4").difference is None


@pytest.mark.parametrize(
    ("found", "expected", "problem"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0001], [1.0, 2.0], None),
        ([1.0, 2.01], [1.0, 2.0], "other outputs"),
        ([float("nan"), 2.0], [float("nan"), 2.0], None),
        ([0.0, 2.0], [float("nan"), 2.0], "other outputs"),
        ([float("nan"), 2.0], [1.0, 2.0], "other outputs"),
        ([float("inf"), 2.0], [float("-inf"), 2.0], "other outputs"),
        ([1.0], [1.0, 2.0], "of shapes"),
    ],
)
def test_what_counts_as_equal(found, expected, problem):
    if problem is None:
        check_equal("it", [torch.tensor(found)], [torch.tensor(expected)])
    else:
        with pytest.raises(RuntimeError, match=problem):
            check_equal("it", [torch.tensor(found)], [torch.tensor(expected)])


# --- files of anyone ---------------------------------------------------------------------------------------------


def written(path, nodes, constants: dict[str, np.ndarray], **metadata: str):
    """A file whose graph takes x (2, 8) and gives y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    initializers = [numpy_helper.from_array(each, name) for name, each in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def two_four(outs: int = 4) -> np.ndarray:
    weight = torch.randn(outs, 8)
    return ow.topn(weight.abs(), ow.Pattern(2, 4)).mul(weight).numpy()


def test_without_a_promise_the_tightest_is_found_and_a_pattern_can_be_asked_for(path):
    dense = np.ones((4, 4), np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"], transB=1), helper.make_node("MatMul", ["h", "d"], ["y"])]
    written(path, nodes, {"w": two_four(), "d": dense})
    found = check_onnx(path)
    assert [(each.name, each.op, str(each.pattern), each.recorded) for each in found] == [
        ("w", "Gemm", "2:4", False),
        ("d", "MatMul", "None", False),
    ]
    with pytest.raises(ow.NotSparse, match="d: 4 of 4 groups") as caught:
        check_onnx(path, "2:4")
    assert list(caught.value.layers) == ["d"]
    assert [each.recorded for each in check_onnx(path, ow.Selection("2:4", exclude=["d"]))] == [True, False]
    with pytest.raises(ow.NotSparse, match=r"1 weight is denser.*\n  w: "):
        check_onnx(path, "1:8")  # 8 does not divide d's 4


def test_the_axis_is_that_of_the_sum(path):
    weight = two_four()
    forms = {
        "Gemm": (helper.make_node("Gemm", ["x", "w"], ["y"]), weight.T),
        "MatMul": (helper.make_node("MatMul", ["x", "w"], ["y"]), weight.T),
        "left": (helper.make_node("Gemm", ["w", "x"], ["y"], transB=1), weight),
        "left transposed": (helper.make_node("Gemm", ["w", "x"], ["y"], transA=1, transB=1), weight.T),
    }
    for node, constant in forms.values():
        written(path, [node], {"w": np.ascontiguousarray(constant)}, openwork='{"w": "2:4"}')
        (matmul,) = check_onnx(path)
        assert matmul.recorded
        wrong = np.ascontiguousarray(np.abs(constant) + 1)
        with pytest.raises(ow.NotSparse):
            check_onnx(written(path, [node], {"w": wrong}, openwork='{"w": "2:4"}'))


def test_constants_are_seen_through_what_moves_them(path):
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(two_four().astype(np.float16)))
    nodes = [
        constant,
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0]),
        helper.make_node("Identity", ["t"], ["i"]),
        helper.make_node("MatMul", ["x", "i"], ["y"]),
    ]
    (matmul,) = check_onnx(written(path, nodes, {}))
    assert (matmul.name, matmul.shape, str(matmul.pattern)) == ("c", (8, 4), "2:4")


def test_branches_are_looked_into(path):
    def branch(name):
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["a", "b"])
        return helper.make_graph([helper.make_node("MatMul", ["x", "w"], [f"{name}_y"])], name, [], [out])

    nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b"))]
    weight = np.ascontiguousarray(two_four().T)
    (matmul,) = check_onnx(written(path, nodes, {"flag": np.array(True), "w": weight}))
    assert str(matmul.pattern) == "2:4"


def test_a_file_denser_than_it_records_is_found(path):
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    with pytest.raises(ow.NotSparse, match="gone: recorded by the file, but nothing multiplies by it"):
        check_onnx(written(path, [node], {"w": two_four()}, openwork='{"w": "2:4", "gone": "2:4"}'))
    with pytest.raises(ow.NotSparse, match="more than 1 of 4"):
        check_onnx(written(path, [node], {"w": two_four()}, openwork='{"w": "1:4"}'))
    for text, complaint in (("[1]", "needed an object"), ('{"w": 1}', "does not map"), ('{"w": "9:4"}', "pattern")):
        with pytest.raises(ValueError, match=complaint):
            check_onnx(written(path, [node], {"w": two_four()}, openwork=text))


def test_what_is_no_onnx_file_is_refused(path):
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"net\.onnx is no valid ONNX file"):
        check_onnx(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.onnx"):
        check_onnx(path.with_name("missing.onnx"))
    node = helper.make_node("Gemm", ["x", "nothing"], ["y"])
    with pytest.raises(ValueError, match="no valid ONNX file"):
        check_onnx(written(path, [node], {}))


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_weights_outside_of_the_folder_are_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(128))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "net.onnx"
    written(path, [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": two_four()})
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="no valid ONNX file"):
        check_onnx(path)
