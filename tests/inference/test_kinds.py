"""A kernel kind is one class: a new one is planned, deployed, saved, loaded and benchmarked; nothing else changes."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fake_times import say
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.bench import operators
from openwork.bench.measure import Roofline
from openwork.inference.layers import PackedLinear
from openwork.layouts.layout import KINDS, Layout, Request, Vectors, kind_named, register_kind

X = torch.randn(3, 16)


class Numbers(NamedTuple):
    n: int
    m: int
    outputs: int
    inputs: int


class Toy(Layout):
    """The dense weight as it is."""

    name = "toy"
    device_type = "cpu"
    weight_dtypes = (torch.float32,)
    best_rows = range(1, 100)
    dense: Tensor

    @classmethod
    def refusal(cls, request: Request) -> str:
        return "" if request.conv is None else "toys are for linear layers"

    @classmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: ow.Pattern, vectors: Vectors) -> Toy:
        return cls({"dense": weight.clone()}, Numbers(pattern.n, pattern.m, *weight.shape))

    def unpack(self) -> Tensor:
        return self.dense

    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y = F.linear(x, self.dense, bias)
        return y.relu() if relu else y


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_kind(Toy)
    yield
    del KINDS["toy"]


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 8)).eval()
    ow.project(model, "2:4")
    return model


def close(fast: nn.Module, model: nn.Module) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-5)


def test_it_is_planned_where_it_is_fastest(monkeypatch: Any) -> None:
    say(monkeypatch, toy=0.4, gemm=0.5)
    assert ow.plan(net(), X, pattern="2:4").chosen == dict.fromkeys(("0.weight", "2.weight", "3.weight"), "toy")
    say(monkeypatch, toy=0.6, gemm=0.5)
    assert set(ow.plan(net(), X, pattern="2:4").chosen.values()) == {"gemm"}


def test_it_is_deployed_and_the_layer_that_was_timed_is_the_layer_that_runs(monkeypatch: Any) -> None:
    say(monkeypatch, toy=0.4, sparse=0.5)
    packs: list[tuple[int, ...]] = []
    pack = Toy.pack
    monkeypatch.setattr(Toy, "pack", lambda weight, *rest: packs.append(tuple(weight.shape)) or pack(weight, *rest))
    model = net()
    fast: Any = ow.deploy(model, X, pattern="2:4")
    assert packs == [(24, 16), (8, 24), (8, 8)]
    assert [type(fast[i].packed) for i in (0, 2, 3)] == [Toy] * 3
    assert fast[0].relu
    assert "toy" in str(fast.deployment)
    close(fast, model)


@pytest.mark.parametrize("how", ["state dict", "pickle", "torch.save"])
def test_it_is_saved_and_loaded(how: str, monkeypatch: Any) -> None:
    say(monkeypatch, toy=0.4, sparse=0.5)
    model, other = net(), net()
    fast: Any = ow.deploy(model, X, pattern="2:4")
    if how == "state dict":
        again: Any = ow.deploy(other, X, pattern="2:4")
        again.load_state_dict(fast.state_dict())
        other.load_state_dict(fast.state_dict())
        close(fast, other)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(again[0].packed) is Toy
    assert torch.equal(again(X), fast(X))


DAMAGE = """
import pickle
import torch, openwork.kernels
from torch import nn
from openwork import Pattern, project
from openwork.inference.layers import pack_layer
from openwork.layouts.layout import Request, kinds_on

x, pattern = torch.randn(5, 512), Pattern(2, 4)
model = nn.Linear(512, 48).requires_grad_(False)
project(model, pattern)
for kind in kinds_on("cpu"):
    for weight_dtype in kind.weight_dtypes:
        dtype = torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32
        request = Request(pattern, dtype, weight_dtype, torch.device("cpu"), openwork.kernels.vectors())
        if kind.refusal(request):
            continue
        layer = pack_layer(model.to(dtype), pattern, kind, weight_dtype)
        for name, right in layer.packed.named_buffers():
            if right.is_floating_point():
                continue
            info = torch.iinfo(right.dtype)
            for wrong in (info.min, info.max, 1, None):
                damaged = torch.full_like(right, wrong) if wrong else right.random_(info.min, info.max)
                layer.packed.register_buffer(name, damaged, persistent=False)
                data = pickle.dumps(layer)
                try:
                    pickle.loads(data)(x.to(dtype))
                    print(kind.name, weight_dtype, name, wrong, "ran", flush=True)
                except ValueError as error:
                    print(kind.name, weight_dtype, name, wrong, "refused", flush=True)
            layer.packed.register_buffer(name, right, persistent=False)
"""


def test_a_pickle_with_damaged_numbers_is_refused_or_runs_and_never_crashes() -> None:
    """Every integer buffer of every kind of a CPU; in a process of its own, which may die."""
    done = subprocess.run([sys.executable, "-c", DAMAGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gemm torch.float32 offsets -32768 refused" in done.stdout
    assert "gemv torch.float32 indices -2147483648 ran" in done.stdout


def test_unpickling_checks_the_contents_of_any_kind(monkeypatch: Any) -> None:
    say(monkeypatch, toy=0.4, sparse=0.5)

    def damaged(_: Any) -> None:
        raise ValueError("index 7 is damaged")

    data = pickle.dumps(ow.deploy(net(), X, pattern="2:4"))
    monkeypatch.setattr(Toy, "check_contents", damaged)
    with pytest.raises(ValueError, match="index 7 is damaged"):
        pickle.loads(data)


def test_it_is_loaded_from_a_file_as_it_was_chosen(tmp_path: Path, monkeypatch: Any) -> None:
    say(monkeypatch, toy=0.4, sparse=0.5)
    model = net()
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    chosen = json.loads(json.dumps(ow.deploy(model, X, pattern="2:4").deployment.chosen))  # type: ignore[union-attr]
    for again in (None, chosen):
        fast: Any = ow.load_deployed(tmp_path / "net.safetensors", net(), X, chosen=again)
        assert isinstance(fast[2], PackedLinear)
        assert {fast[i].kind for i in (0, 2, 3)} == {"toy"}
        close(fast, model)
    with pytest.raises(ValueError, match=r"no kernel is named 'game'; there are .*gemm.*toy"):
        ow.load_deployed(tmp_path / "net.safetensors", net(), X, chosen={"0.weight": "game"})


def test_it_is_benchmarked() -> None:
    rows = operators.time_linear(Roofline(1e9, 1e9), [(4, 16, 8)], [ow.Pattern(2, 4)], 0, dtypes=["float32"])
    assert {row.impl for row in rows} >= {"toy 2:4 float32", "gemm 2:4 float32"}


def test_it_is_not_asked_for_weights_in_a_dtype_that_it_does_not_have(monkeypatch: Any) -> None:
    say(monkeypatch, toy=0.4, gemm=0.5, gemv=0.6)
    assert set(ow.plan(net(), X, pattern="2:4", weight_dtype=torch.int8).chosen.values()) == {"gemm"}
    rows = operators.time_linear(Roofline(1e9, 1e9), [(4, 16, 8)], [ow.Pattern(2, 4)], 0, dtypes=["int8"])
    assert not any("toy" in row.impl for row in rows)
    monkeypatch.setattr("openwork.inference.choose.kinds_on", lambda _: [Toy])
    (timing, *_) = ow.plan(net(), X, pattern="2:4", weight_dtype=torch.bfloat16).layers
    assert timing.reason == "toy keeps no torch.bfloat16: torch.float32"


def test_a_name_is_given_once() -> None:
    class Other(Toy):
        pass

    with pytest.raises(ValueError, match="two kernel kinds are named 'toy': Toy is one"):
        register_kind(Other)
    assert register_kind(Toy) is kind_named("toy") is Toy


def test_an_error_of_a_kind_is_an_error_and_no_slow_layer(monkeypatch: Any) -> None:
    """A refusal of its library alone leaves the layer dense."""

    def buggy(self: Any, *_: Any) -> Tensor:
        raise IndexError("a bug of ours")

    monkeypatch.setattr(Toy, "linear", buggy)
    with pytest.raises(IndexError, match="a bug of ours"):
        ow.plan(net(), X, pattern="2:4")
