"""Optimizer states and weights in another order: a wrong order is an error where it happens, a right one works."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import openwork as ow

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
MAKES = [
    partial(torch.optim.AdamW, lr=0.01),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.Adam, lr=0.01, fused=True),
]
METHODS = [ow.SRSTE(0.1), ow.STE(), ow.ASP()]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def dense_run(make):
    """The states of a model and of its optimizer after some dense steps."""
    model = net()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_dense_run_goes_on_with_its_optimizer(make, method):
    """Build, load both, sparsify, attach: every weight keeps its own moments."""
    weights, state = dense_run(make)
    model = net()
    model.load_state_dict(weights)
    optimizer = make(model.parameters())
    optimizer.load_state_dict(state)
    moments = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    ow.sparsify(model, "2:4", method)
    handle = ow.attach(optimizer, model)
    for name, p in model.named_parameters():
        plain = name.replace("parametrizations.weight.original", "weight")
        assert all(
            torch.equal(torch.as_tensor(optimizer.state[p][k]), torch.as_tensor(v)) for k, v in moments[plain].items()
        )
    step(model, optimizer)
    assert handle.steps == 1
    ow.verify(model, X)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("order", ["load, attach", "attach, load", "load alone"])
def test_the_state_of_a_dense_run_in_a_sparse_one_is_refused(make, method, order):
    weights, state = dense_run(make)
    model = net()
    model.load_state_dict(weights)
    ow.sparsify(model, "2:4", method)
    optimizer = make(model.parameters())

    def load_and_go():
        if order == "attach, load":
            ow.attach(optimizer, model)
        optimizer.load_state_dict(state)
        if order == "load, attach":
            ow.attach(optimizer, model)
        step(model, optimizer)

    with pytest.raises(
        ValueError, match=r"(?s)has shape \(32, 16\), the parameter \(32,\): .*build the optimizer on the dense"
    ):
        load_and_go()


class Pair(nn.Module):
    """Two weights of one shape, of which one becomes sparse and so the last."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.a.t() @ self.b.t()


def test_where_shapes_do_not_tell_names_do():
    dense = Pair()
    optimizer = torch.optim.Adam(dense.named_parameters(), lr=0.1)
    dense(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    model = Pair()
    ow.sparsify(model, {"a": "2:4"}, axis={"a": 1})
    other = torch.optim.Adam(model.named_parameters(), lr=0.1)
    ow.attach(other, model)
    with pytest.raises(ValueError, match=r"the optimizer state of a stands where b does"):
        other.load_state_dict(optimizer.state_dict())
    again = Pair()
    ow.sparsify(again, {"a": "2:4"}, axis={"a": 1})
    last = torch.optim.Adam(again.named_parameters(), lr=0.1)
    ow.attach(last, again)
    last.load_state_dict(other.state_dict())


# --- load_state_dict(assign=True) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("part", ["", "0"])
def test_weights_assigned_after_the_optimizer_was_built_are_named(method, attached, part):
    model = net()
    ow.sparsify(model, "2:4", method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if attached:
        ow.attach(optimizer, model)
    for stepped in (False, True):
        if stepped and not (attached or method.decay):
            step(model, optimizer)
        assigned = model.get_submodule(part)
        assigned.load_state_dict(copy.deepcopy(assigned.state_dict()), assign=True)
        with pytest.raises(RuntimeError, match=r"0\.weight.* no longer what this SGD holds: .*assign=True"):
            step(model, optimizer)
        optimizer.add_param_group({"params": list(assigned.parameters())})
        if attached or not method.decay:
            step(model, optimizer)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_assigned_before_the_optimizer_is_built_they_train(method):
    model, weights = net(), net().state_dict()
    ow.sparsify(model, "2:4", method)
    ow.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    state = {**model.state_dict(), **{name: -tensor for name, tensor in weights.items()}}
    model.load_state_dict(state, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ow.attach(optimizer, model)
    step(model, optimizer)
    assert handle.steps == 1
    assert not torch.equal(model.state_dict()["0.weight"], -weights["0.weight"])


def test_an_optimizer_of_other_weights_goes_on():
    model, other = net(), net()
    ow.sparsify(model, "2:4")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    step(other, optimizer)
