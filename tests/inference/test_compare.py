"""`ow.deploy` says which other engine is faster: times are said, the engines are fake, but for one test."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from fake_times import say
from torch import nn

import openwork as ow
from openwork.engines.case import Refused
from openwork.engines.engine import Engine
from openwork.inference import compare

X = torch.randn(4, 32)
OPENVINO, OTHER = (Engine(name, "-", ("float32",), ("onnx",)) for name in ("OpenVINO", "ONNX Runtime"))


def net():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    ow.project(model, "2:4")
    return model


@pytest.fixture
def engine(monkeypatch):
    """`engine(seconds)`: an OpenVINO that takes so long, where what is returned takes one second; or raises."""
    monkeypatch.delenv(compare.OFF)
    monkeypatch.setattr(compare, "ENGINES", (OPENVINO, OTHER))
    monkeypatch.setattr(Engine, "missing", lambda self: "not installed: pip install it" if self is OTHER else "")
    monkeypatch.setattr(compare, "timed", lambda call, seconds: [1.0])
    say(monkeypatch, gemm=0.5, gemv=0.5, sparse=0.5)
    seen = []

    class FakeWorker:
        def __init__(self, target, case, seconds):
            program = torch.export.load(case.folder / "program.pt2")
            seen.append((case.precision, seconds, program))
            if isinstance(engine.takes, Exception):
                raise engine.takes
            self.names, self.about = [f"OpenVINO 1.0, {case.precision}"], {"left out": {}}

        def turn(self, name, seconds, most):
            return [engine.takes]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

    class engine:
        takes = 1.0

    monkeypatch.setattr(compare, "Worker", FakeWorker)
    engine.seen = seen
    return engine


def test_a_faster_engine_is_said(engine):
    engine.takes = 0.5
    with pytest.warns(UserWarning, match=r"OpenVINO 1.0, float32, runs the dense network in 500.00 ms, 2.00 times as"):
        fast = ow.deploy(net(), X, pattern="2:4")
    found = fast.deployment.engines
    assert (found.times, found.returned) == ({"OpenVINO 1.0, float32": 0.5}, 1.0)
    assert found.left_out == {"ONNX Runtime": "not installed: pip install it"}
    table = str(fast.deployment)
    assert "dense in OpenVINO 1.0, float32: 500.00 ms" in table
    assert table.endswith("2.00 times as fast as what is returned (1000.00 ms)")
    (precision, seconds, program), closed = engine.seen
    assert (precision, closed) == ("float32", "closed")
    assert 0 < seconds <= 60
    assert len(list(program.state_dict)) == 4


@pytest.mark.parametrize("takes", [1.0, 0.98, 3.0])
def test_a_slower_one_is_not(engine, takes):
    engine.takes = takes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = ow.deploy(net(), X, pattern="2:4")
    assert fast.deployment.engines.faster == ""
    assert f"dense in OpenVINO 1.0, float32: {takes * 1e3:.2f} ms" in str(fast.deployment)


def test_in_the_precision_of_the_weights(engine):
    model = net()
    ow.deploy(model, X, pattern="2:4", weight_dtype=torch.int8)
    ow.deploy(copy.deepcopy(model).bfloat16(), X.bfloat16(), pattern="2:4")
    cases = [each for each in engine.seen if each != "closed"]
    assert [precision for precision, *_ in cases] == ["int8", "bfloat16"]
    for _, _, program in cases:  # engines round by themselves
        assert {each.dtype for each in program.state_dict.values()} == {torch.float32}


@pytest.mark.parametrize("error", [Refused("it took too long"), OSError(28, "No space"), RuntimeError("disk")])
def test_what_could_not_be_compared_is_told(engine, error):
    engine.takes = error
    fast = ow.deploy(net(), X, pattern="2:4")
    assert fast.deployment.engines.times == {}
    assert f"not compared with OpenVINO: {error}" in str(fast.deployment).replace(f"{type(error).__name__}: ", "")


def test_a_network_that_cannot_be_exported_is_deployed_all_the_same(engine):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(32, 32)

        def forward(self, x):
            return self.line(x) if x.sum() > 0 else -self.line(x)

    model = Branches().eval()
    ow.project(model, "2:4")
    fast = ow.deploy(model, X, pattern="2:4")
    torch.testing.assert_close(fast(X), model(X))
    assert "torch.export does not take the network" in fast.deployment.engines.left_out["OpenVINO"]


def test_what_is_not_asked_costs_nothing(engine, monkeypatch):
    monkeypatch.setattr(compare, "write_program", lambda *_: pytest.fail("exported"))
    assert ow.deploy(net(), X, pattern="2:4", engine_seconds=0).deployment.engines is None
    monkeypatch.setattr(compare, "MOST_BYTES", 1 << 10)
    assert "of weights" in ow.deploy(net(), X, pattern="2:4").deployment.engines.left_out["OpenVINO"]
    monkeypatch.setattr(compare, "ENGINES", (OTHER,))
    assert list(ow.deploy(net(), X, pattern="2:4").deployment.engines.left_out) == ["ONNX Runtime"]
    monkeypatch.setenv(compare.OFF, "1")
    assert ow.deploy(net(), X, pattern="2:4").deployment.engines is None


@pytest.mark.slow
def test_the_real_ones(monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    monkeypatch.delenv(compare.OFF)
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so small a network any may win
        found = ow.deploy(model, X, pattern="2:4").deployment.engines
    assert [name.split()[0] for name in found.times] == ["OpenVINO", "ONNX"]
    assert all(0 < seconds < 1 for seconds in (*found.times.values(), found.returned))
    assert found.left_out == {}
