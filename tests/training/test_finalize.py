"""`finalize` gives back the plain model: classes, parameters, order, outputs, and exact zeros."""

import copy
import warnings

import pytest
import torch
from torch import nn

import openwork as ow

METHODS = (ow.SRSTE(), ow.STE(), ow.ASP())


class Mixed(nn.Module):
    """A module of each kind; every owner has more parameters than the sparse ones, on both sides of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.rnn = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 8, 2)
        self.fc = nn.Linear(8, 3, bias=False)
        self.bare = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.rnn(self.attention(x, x, x)[0])[0].transpose(1, 2)
        return self.fc(self.up(x).transpose(1, 2) @ self.bare[0])


@pytest.fixture
def x():
    return torch.randn(2, 8, 5)


def sparsified(method=METHODS[0]):
    model = Mixed().eval()
    ow.sparsify(model, "2:4", method, axis={"bare": 1})
    return model


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_outputs_are_identical_before_and_after(method, x):
    model = sparsified(method)
    before = model(x)
    assert torch.equal(ow.finalize(model)(x), before)


def test_classes_hooks_and_attributes_are_those_of_a_plain_model(x):
    plain, model = Mixed(), sparsified()
    model(x)
    ow.finalize(model)
    for (name, a), (other, b) in zip(plain.named_modules(), model.named_modules(), strict=True):
        assert name == other
        assert type(a) is type(b)
        assert a.__dict__.keys() == b.__dict__.keys()
        assert not any(value for key, value in b.__dict__.items() if "hook" in key and value is not None)


def test_parameters_are_the_same_objects_in_the_same_order():
    model = Mixed()
    names, parameters = zip(*model.named_parameters(), strict=True)
    ow.sparsify(model, "2:4", axis={"bare": 1})
    ow.finalize(model)
    assert [name for name, _ in model.named_parameters()] == list(names)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pruned_weights_are_plus_zero_and_kept_ones_untouched(method):
    plain = Mixed()
    model = copy.deepcopy(plain)
    report = ow.sparsify(model, "2:4", method, axis={"bare": 1})
    ow.finalize(model)
    for name in report.sparse:
        weight = model.get_parameter(name)
        pruned = weight == 0
        assert int(pruned.sum()) == weight.numel() // 2
        assert not weight[pruned].signbit().any()
        assert torch.equal(weight[~pruned], plain.get_parameter(name)[~pruned])


def test_a_dense_method_keeps_all_weights(x):
    model = Mixed().eval()
    before = model(x)
    ow.sparsify(model, "2:4", ow.Dense(), axis={"bare": 1})
    assert torch.equal(ow.finalize(model)(x), before)


@pytest.mark.parametrize("again", [copy.deepcopy, ow.project], ids=["copied", "projected"])
def test_a_finalized_model_is_used_like_any_other(again, x):
    model = ow.finalize(sparsified())
    expected = model(x)
    if again is ow.project:
        ow.project(model, "2:4", axis={"bare": 1})
    else:
        model = again(model)
    assert torch.equal(model(x), expected)
    assert ow.sparsify(model, "2:4", axis={"bare": 1}).sparse


def test_a_finalized_rnn_follows_its_weights():
    """Its kernel reads a list that torch makes once."""
    model, x = nn.LSTM(8, 8), torch.randn(3, 2, 8)
    ow.sparsify(model, "2:4")
    model(x)
    ow.finalize(model)
    before = model(x)[0]
    with torch.no_grad():
        model.weight_ih_l0.mul_(2)
    assert not torch.equal(model(x)[0], before)
    copy.deepcopy(model.double())(x.double())


def test_finalizing_keeps_gradients_and_frozen_flags(x):
    model = sparsified()
    model(x).sum().backward()
    grad = model.fc.parametrizations.weight.original.grad
    model.conv.parametrizations.weight.original.requires_grad_(False)
    ow.finalize(model)
    assert model.fc.weight.grad is grad
    assert not model.conv.weight.requires_grad


def test_finalizing_scripts_and_returns_the_model():
    model = nn.Sequential(nn.Linear(8, 8))
    ow.sparsify(model, "2:4")
    assert ow.finalize(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is doing away with it: DeprecationWarning, since 2.14 FutureWarning
        scripted = torch.jit.script(model)
    x = torch.randn(2, 8)
    assert torch.equal(scripted(x), model(x))


def test_finalizing_by_parts_ends_with_a_plain_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ow.sparsify(model, "2:4")
    ow.finalize(model[0])
    assert type(model[0]) is nn.Linear
    ow.verify(model, torch.ones(1, 8))
    ow.finalize(model[1])
    ow.finalize(model)
    assert "_openwork_record" not in model.__dict__
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match=r"Linear is not sparsified: nothing to finalize \(ow\.project zeroes"):
        ow.finalize(nn.Linear(8, 8))
    model = ow.finalize(sparsified())
    with pytest.raises(ValueError, match="Mixed is not sparsified"):
        ow.finalize(model)
