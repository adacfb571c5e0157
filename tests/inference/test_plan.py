"""`ow.plan`: every layer measured on its own shapes, and what is chosen. Times are said, not taken."""

from __future__ import annotations

import copy
import itertools
import re
import sys
import types

import pytest
import torch
from fake_times import say
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.inference import choose
from openwork.utils import timing
from openwork.utils.timing import fastest

P24 = ow.Pattern(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.b(self.a(self.a(x)))


def net():
    model = Net().eval()
    ow.project(model, "2:4")
    return model


X = torch.randn(2, 8, 6, 6)


def test_layers_are_chosen_by_their_times(monkeypatch):
    say(monkeypatch, torch=1.0, oneDNN=0.5, channels_last=0.7, gemm=0.4, gemv=0.3)
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = ow.plan(model, X, pattern=ow.Selection("2:4", exclude=["b"]))
    conv, a, unused, b = found.layers
    assert (conv.name, conv.dense, conv.dense_by, conv.sparse, conv.kind) == (
        "conv.weight", 0.7, "channels_last", 0.4, "gemm")  # fmt: skip
    assert conv.inputs == ((2, 8, 6, 6),)
    assert conv.ratio == pytest.approx(0.7 / 0.4)
    assert (a.dense_by, a.dense, a.sparse, a.kind) == ("oneDNN prepacked", 1.0, 0.6, "gemv")  # called twice
    assert (unused.kind, unused.reason, unused.dense) == (None, "the example does not reach it", 0.0)
    assert (b.kind, b.reason, b.pattern) == (None, "excluded by 'b'", None)
    assert found.chosen == {"conv.weight": "gemm", "a.weight": "gemv"}
    assert (found.whole, found.difference) == ({}, None)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert type(model.norm) is nn.BatchNorm2d


@pytest.mark.parametrize(("sparse", "kind", "reason"), [(0.96, "gemm", ""), (0.98, None, "dense is faster")])
def test_a_margin_is_left_for_noise(monkeypatch, sparse, kind, reason):
    say(monkeypatch, gemm=sparse)
    conv = ow.plan(net(), X, pattern="2:4").layers[0]
    assert (conv.kind, conv.reason, conv.sparse) == (kind, reason, sparse)


@pytest.mark.skipif(not ow.kernels.vectors().dot_product, reason="needs AVX-512 with VBMI and VNNI")
def test_dot_products_are_for_layers_in_bfloat16_and_for_int8(monkeypatch):
    """A convolution in the better memory format, as a dense one; by default weights stay in the model's dtype."""
    half = net().bfloat16()
    say(monkeypatch, **{"gemm": 0.5, "gemv": 0.5, "dot_product": 0.4, "dot_product, channels_last": 0.3})
    found = ow.plan(half, X.bfloat16(), pattern="2:4")
    assert found.weight_dtype == torch.bfloat16
    assert {each.name: (each.kind, each.sparse) for each in found.layers if each.kind} == {
        "conv.weight": ("dot_product", 0.3),
        "a.weight": ("dot_product", 0.8),
        "b.weight": ("dot_product", 0.4),
    }
    alone = choose.measure_layers(half, X.bfloat16(), {"conv.weight": P24}, torch.bfloat16, formats=False)
    assert [(each.kind, each.sparse) for each, _ in alone] == [("dot_product", 0.4)]
    assert set(ow.plan(net(), X, pattern="2:4", weight_dtype=torch.int8).chosen.values()) == {"dot_product"}
    for model, x, weight_dtype in ((net(), X, torch.bfloat16), (half, X.bfloat16(), torch.float32)):
        assert "dot_product" not in ow.plan(model, x, pattern="2:4", weight_dtype=weight_dtype).chosen.values()


def test_alike_layers_are_measured_once(monkeypatch):
    asked = []
    say(monkeypatch, gemm=0.5, gemv=0.6)
    timer = timing.fastest
    monkeypatch.setattr(timing, "fastest", lambda variants: asked.append(sorted(variants)) or timer(variants))
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4))
    ow.project(model, "2:4")
    found = ow.plan(model, torch.randn(2, 8), pattern="2:4")
    assert len(asked) == 2
    assert [each.name for each in found.layers] == [f"{i}.weight" for i in range(4)]
    assert found.layers[3].shape == (4, 8)
    assert {"torch", "gemm", "gemv"} <= set(asked[0])


def test_shapes_that_come_are_all_measured(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(input=x[0]), self.layer(x), self.layer(x)

    say(monkeypatch, oneDNN=2.0, gemm=0.5, gemv=0.75)
    model = Twice()
    ow.project(model, "2:4")
    (layer,) = ow.plan(model, torch.randn(3, 8), pattern="2:4").layers
    assert layer.inputs == ((8,), (3, 8))
    assert (layer.dense, layer.sparse, layer.kind) == (3.0, 1.5, "gemm")


def test_a_baseline_must_have_run_on_every_shape(monkeypatch):
    say(monkeypatch, oneDNN=0.1, gemm=0.5)
    usual = choose.prepacked_linear
    monkeypatch.setattr(choose, "prepacked_linear", lambda w, b, rows: usual(w, b, rows) if rows == 3 else None)
    model = Both(nn.Linear(8, 8))
    ow.project(model, "2:4")
    (layer,) = ow.plan(model, torch.randn(3, 8), pattern="2:4").layers
    assert (layer.dense_by, layer.dense) == ("torch", 2.0)


class Both(nn.Module):
    """One layer on all rows and on the first."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x), self.layer(x[:1])


def hooked():
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, given, found: found + 1)
    return layer


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


REASONS = {
    "lstm": (lambda: nn.LSTM(8, 8, batch_first=True), (2, 3, 8), {"weight_ih_l0": "no kernel for LSTM.weight_ih_l0"}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        (2, 3, 8),
        {
            "self_attn.in_proj_weight": "no kernel for MultiheadAttention.in_proj_weight",
            "self_attn.out_proj.weight": "no kernel for NonDynamicallyQuantizableLinear.weight",
            "linear1.weight": "",
        },
    ),
    "transposed": (lambda: nn.ConvTranspose1d(8, 8, 3), (2, 8, 5), {"weight": "no kernel for ConvTranspose1d.weight"}),
    "conv3d": (lambda: nn.Conv3d(8, 8, 1), (2, 8, 2, 2, 2), {"weight": "no kernel for Conv3d.weight"}),
    "hooks": (lambda: nn.Sequential(hooked()), (2, 8), {"0.weight": "it has hooks, or a forward of its own"}),
    "circular": (
        lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        (2, 8, 5),
        {"weight": "padding_mode='circular': kernels pad with zeros"},
    ),
    "float64": (
        lambda: nn.Linear(8, 8).double(),
        (2, 8),
        {"weight": "torch.float64 on a CPU: kernels there are for float32 and bfloat16"},
    ),
    "autocast": (
        lambda: Autocast(nn.Linear(8, 8), nn.Linear(8, 8)),
        (2, 8),
        {"0.weight": "", "1.weight": "its inputs are torch.bfloat16, its weight torch.float32"},
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_layers_without_a_kernel_say_why(name, monkeypatch):
    say(monkeypatch, gemm=0.5)
    make, shape, expected = REASONS[name]
    model = make().eval()
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    ow.project(model, "2:4")
    found = {each.name: each.reason for each in ow.plan(model, x, pattern="2:4").layers}
    for weight, reason in expected.items():
        assert found[weight].startswith(reason), found
        assert bool(found[weight]) == bool(reason)


def test_groups_along_another_axis_stay_dense(monkeypatch):
    say(monkeypatch, gemm=0.5)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    ow.project(model, "2:4", axis="kernel")
    found = ow.plan(model, X, pattern=ow.Selection("2:4", axis="kernel")).layers
    assert [each.reason for each in found] == ["its groups run along another axis than products sum over", ""]
    assert [each.kind for each in found] == [None, "gemm"]  # of a 1x1 kernel they are the same


def test_int8_has_no_infinity(monkeypatch):
    say(monkeypatch, gemm=0.5)
    model = nn.Sequential(nn.Linear(8, 8))
    ow.project(model, "2:4")
    model[0].weight.data[0, 0] = torch.inf
    model[0].weight.data[0, 1:4] = 0
    x = torch.randn(2, 8)
    assert ow.plan(model, x, pattern="2:4").chosen == {"0.weight": "gemm"}
    found = ow.plan(model, x, pattern="2:4", weight_dtype=torch.int8)
    assert found.layers[0].reason == "its weight holds numbers that are not finite, which int8 cannot"


def test_the_table(monkeypatch):
    say(monkeypatch, torch=1e-3, oneDNN=2e-3, channels_last=1.5e-3, gemm=0.5e-3, gemv=0.7e-3)
    text = str(ow.plan(net(), X, pattern=ow.Selection("2:4", exclude=["b"])))
    first, header, *lines, summary = text.splitlines()
    assert re.fullmatch(rf"1 thread, torch {re.escape(torch.__version__)}, .*native kernels.*", first)
    assert header.split() == [
        "weight",
        "shape",
        "pattern",
        "inputs",
        "dense",
        "us",
        "by",
        "sparse",
        "us",
        "ratio",
        "choice",
        "reason",
    ]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines if "---" not in line]
    conv = next(line for line in cells if line[0] == "conv.weight")
    assert conv == ["conv.weight", "8x8x3x3", "2:4", "2x8x6x6", "1000", "torch", "500", "2.00", "gemm"]
    assert [line[-2:] for line in cells if line[0] in ("b.weight", "unused.weight")] == [
        ["dense", "the example does not reach it"], ["dense", "excluded by 'b'"]]  # fmt: skip
    assert summary == "2 of 4 weights run sparse, stored in torch.float32"


def test_variants_take_turns(monkeypatch):
    clock, ran = itertools.count(), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = fastest({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, seconds=0.1)
    assert found == {"a": 1.0, "b": 1.0}
    assert ran == ["a", "b", *["a", "b", "b", "a"] * 2][: len(ran)]
    assert len(ran) == 2 * (1 + 3)  # to warm up, and at least three


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """`openwork plan made:net --input 1x8x6x6`."""
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(net=net))
    say(monkeypatch, gemm=0.5, gemv=0.6)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_openwork_plan(small, capsys):
    words = ["plan", "made:net", "--input", "1x8x6x6", "--batch", "3", "--threads", "2", "--weight-dtype", "bfloat16"]
    assert main([*words, "--pattern", "1:4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 threads, torch ")
    assert re.search(r"conv\.weight +8x8x3x3 +1:4 +3x8x6x6 ", printed)
    assert "3 of 4 weights run sparse, stored in torch.bfloat16" in printed


def test_openwork_plan_of_a_file(small, capsys, tmp_path):
    model = net()
    ow.project(model, "1:8")
    ow.save(model, tmp_path / "net.safetensors", pattern="1:8")
    words = ["plan", str(tmp_path / "net.safetensors"), "--model", "made:net", "--input", "1x8x6x6"]
    assert main(words) == 0
    assert re.search(r"conv\.weight +8x8x3x3 +1:8 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "resnet19"], "resnet19"),
        (["plan", "encoder", "--pattern", "5:4"], "Pattern(5, 4)"),
        (["plan", "encoder", "--threads", "0"], "threads"),
        (["plan", "/no/such.safetensors", "--model", "torch.nn:Identity", "--input", "1"], "/no/such.safetensors"),
        (["bench", "resnet19"], "resnet19"),
        (["bench", "masks", "--patterns", "0:4"], "Pattern(0, 4)"),
    ],
)
def test_mistakes_get_one_line_and_status_two(words, message, capsys, monkeypatch, tmp_path):
    from openwork.bench import models

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "Encoder", lambda: nn.Linear(768, 4))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("openwork: ")
    assert error.count("\n") == 1
