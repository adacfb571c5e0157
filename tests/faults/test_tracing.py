"""A trace of a sparsified model: what the model computes, in operators that every reader of traces knows."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import openwork as ow

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
METHODS = (ow.SRSTE(), ow.STE(), ow.ASP(), ow.TransposableSRSTE(), ow.MdGf(10), ow.Dense())


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16)).eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_trace_runs_where_openwork_is_not(method, grad) -> None:
    model, x, other = net(), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    ow.sparsify(model, "2:4", method)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    assert torch.equal(traced(other), model(other))
    assert "openwork::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)  # refuses calls of Python
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(other), model(other))


def test_a_trace_in_training_mode_warns_of_what_it_lacks() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16)
    ow.sparsify(model, "2:4")
    with pytest.warns(UserWarning, match="keeps the masks of now"):
        traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model[3]], ids=["model", "layer"])
def test_symbolic_traces(part) -> None:
    model = net()
    ow.sparsify(model, "2:4")
    traced = torch.fx.symbolic_trace(part(model))
    x = torch.randn(2, 4, 4, 4) if part(model) is model else torch.randn(2, 32)
    assert torch.equal(traced(x), part(model)(x))


def test_openvino_converts_a_sparsified_model() -> None:
    openvino = pytest.importorskip("openvino")
    model, x = net(), torch.randn(2, 4, 4, 4)
    ow.sparsify(model, "2:4")
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU")
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), model(x).detach(), rtol=1e-2, atol=1e-2)
