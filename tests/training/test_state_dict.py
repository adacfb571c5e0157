"""Checkpoints of a sparsified model are those of the dense one, and load both ways."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import openwork as ow

RECOMPUTED = (ow.SRSTE(), ow.STE(), ow.Dense())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.rnn = nn.GRU(16, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        self.bare = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, ids):
        x = self.rnn(self.layer(self.embed(ids)))[0][:, -1]
        return self.head(self.norm(x))


def net(method=None):
    model = Net().eval()
    if method:
        ow.sparsify(model, "2:4", method)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 8, (2, 5))


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", RECOMPUTED, ids=str)
def test_names_and_their_order_are_those_of_the_dense_model(method):
    model = net()
    before = copy.deepcopy(model.state_dict())
    ow.sparsify(model, "2:4", method)
    assert equal(model.state_dict(), before)
    assert equal(model.state_dict(prefix="a."), {"a." + name: value for name, value in before.items()})
    assert model.state_dict(keep_vars=True)["head.0.weight"] is model.head[0].parametrizations.weight.original


def test_fixed_masks_stand_behind_the_dense_names():
    model = net(ow.ASP())
    names = list(model.state_dict())
    masks = {f"{name}_mask" for name in ow.masks(model)}
    assert [name for name in names if name not in masks] == list(net().state_dict())
    assert masks <= set(names)
    assert model.state_dict()["head.0.weight_mask"].dtype == torch.bool


def test_a_part_of_a_model_and_its_root_have_dense_names_too():
    model = net(ow.SRSTE())
    assert list(model.head.state_dict()) == list(Net().head.state_dict())
    linear = nn.Linear(8, 8)
    ow.sparsify(linear, "2:4")
    assert list(linear.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", RECOMPUTED, ids=str)
def test_checkpoints_load_strictly_both_ways(method, assign, ids):
    dense, sparse = net(), net(method)
    sparse.load_state_dict(dense.state_dict(), strict=True, assign=assign)
    assert equal(sparse.state_dict(), dense.state_dict())
    other = net()
    other.load_state_dict(sparse.state_dict(), strict=True, assign=assign)
    assert torch.equal(other(ids), dense(ids))
    if method.sparse:
        ow.verify(sparse, ids)
        ow.finalize(sparse)
        ow.project(other, "2:4")
        assert torch.equal(other(ids), sparse(ids))


def test_a_dense_checkpoint_fills_fixed_masks_and_says_so(ids):
    dense, sparse = net(), net(ow.ASP())
    with pytest.warns(UserWarning, match="the checkpoint is dense: fixed masks were chosen anew, from its weights"):
        sparse.load_state_dict(dense.state_dict(), strict=True)
    ow.project(dense, "2:4")
    assert torch.equal(sparse(ids), dense(ids))


@pytest.mark.parametrize("method", [*RECOMPUTED, ow.ASP()], ids=str)
def test_a_sparse_checkpoint_resumes_without_a_word(method, ids):
    model, other = net(method), net(method)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each))  # so that an ASP mask is no longer the one that the weights would give
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert equal(other.state_dict(), model.state_dict())
    assert torch.equal(other(ids), model(ids))


def test_a_checkpoint_of_fixed_masks_does_not_pass_for_a_dense_one():
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"head\.0\.weight_mask"'):
        net().load_state_dict(net(ow.ASP()).state_dict())


def test_missing_and_unexpected_names_are_reported_as_dense_ones():
    state = net().state_dict()
    del state["head.0.weight"], state["layer.self_attn.in_proj_weight"]
    state["head.2.weight"] = torch.zeros(1)
    found = net(ow.SRSTE()).load_state_dict(state, strict=False)
    assert sorted(found.missing_keys) == ["head.0.weight", "layer.self_attn.in_proj_weight"]
    assert found.unexpected_keys == ["head.2.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"head\.0\.weight"'):
        net(ow.SRSTE()).load_state_dict(state)


def test_loading_leaves_the_given_state_as_it_was():
    state = net().state_dict()
    before = dict(state)
    with pytest.warns(UserWarning, match="chosen anew"):
        net(ow.ASP()).load_state_dict(state)
    assert equal(state, before)


def test_a_model_on_the_meta_device_is_filled_from_a_checkpoint(ids):
    dense = net()
    with torch.device("meta"):
        sparse = net(ow.SRSTE())
    sparse.load_state_dict(dense.state_dict(), assign=True)
    ow.verify(sparse, ids)
    ow.finalize(sparse)
    ow.project(dense, "2:4")
    assert torch.equal(sparse(ids), dense(ids))


def test_an_optimizer_state_resumes_into_the_same_parameters(ids):
    """The order of the parameters differs from the dense model's, but not between two sparsified ones."""
    model, other = net(ow.STE()), net(ow.STE())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in other.named_parameters()]
    optimizer = torch.optim.Adam(model.parameters())
    model(ids).sum().backward()
    optimizer.step()
    resumed = torch.optim.Adam(other.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        assert optimizer.state[parameter].keys() == resumed.state[twin].keys()


@pytest.mark.parametrize("method", [ow.SRSTE(), ow.ASP(), ow.TransposableSRSTE()], ids=lambda method: method.name)
def test_torch_s_helpers_for_checkpoints_find_all_that_is_stored(method):
    """`get_model_state_dict` asks each module for every name of its state dict."""

    def made(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        ow.sparsify(net, "2:4", method)
        return net

    net, other = made(0), made(1)
    state = {name: tensor.clone() for name, tensor in get_model_state_dict(net).items()}
    assert state.keys() == net.state_dict().keys()
    assert hasattr(net[0], "weight_mask") == ("0.weight_mask" in state)
    set_model_state_dict(other, state)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in other.state_dict().items())
    x = torch.randn(3, 8)
    assert torch.equal(other(x), net(x))
