"""Averages of a model in training are N:M, also with buffers, which are added and subtracted: masks are none."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import openwork as ow

EVERY = 3
METHODS = [ow.ASP(), ow.TransposableSRSTE(0.1, refresh_every=EVERY), ow.SRSTE(0.1)]
AVERAGES = {
    "SWA": {},
    "EMA": {"avg_fn": get_ema_avg_fn(0.7)},
    "EMA of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.7)},
}


def net(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))
    ow.sparsify(model, "2:4", method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ow.attach(optimizer, model)
    return model, optimizer


def train(model, optimizer, steps, after=lambda: None):
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 4, 4, 4, generator=draw)) - 3).square().mean().backward()
        optimizer.step()
        after()


def check_sparse(model, tmp_path):
    """The model is 2:4 in every view of it, and all views are one."""
    model.eval()
    ow.verify(model)
    x = torch.randn(2, 4, 4, 4)
    used = {name: model.get_submodule(name[:1]).weight.detach() for name in ow.masks(model)}
    assert all(torch.equal(used[name] != 0, mask) for name, mask in ow.masks(model).items())
    ow.save(model, tmp_path / "average.safetensors")
    plain = ow.finalize(copy.deepcopy(model))
    assert torch.equal(plain(x), model(x))
    loaded = ow.load_state_dict(tmp_path / "average.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_average_is_as_sparse_as_its_model(tmp_path, method, use_buffers, kind):
    model, optimizer = net(method)
    average = AveragedModel(model, use_buffers=use_buffers, **AVERAGES[kind])
    before = ow.masks(model)
    train(model, optimizer, 2 * EVERY + 1, lambda: average.update_parameters(model))
    inner = average.module
    if method.name == "asp":
        assert all(torch.equal(mask, before[name]) for name, mask in ow.masks(inner).items())
    if method.name == "transposable-sr-ste":
        assert any(not torch.equal(mask, before[name]) for name, mask in ow.masks(model).items())
        for name, mask in ow.masks(inner).items():
            weight = inner.get_submodule(name[:1]).parametrizations.weight.original.detach()
            again = ow.sparsify(twin := copy.deepcopy(plain_of(inner, name, weight)), "2:4", method)
            assert again.sparse
            assert torch.equal(mask, ow.masks(twin)["weight"])
    check_sparse(inner, tmp_path)


def plain_of(model, name, weight):
    """A plain layer with a dense weight of the model."""
    layer = nn.Conv2d(4, 8, 3) if weight.ndim == 4 else nn.Linear(32, 8)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_average_from_its_state_dict_is_the_same(method):
    """Also where nothing has asked for the masks of the first before it was saved."""
    model, optimizer = net(method)
    average = AveragedModel(model)
    train(model, optimizer, 2 * EVERY + 1, lambda: average.update_parameters(model))
    again = AveragedModel(net(method)[0])
    again.load_state_dict(copy.deepcopy(average.state_dict()))
    masks = ow.masks(again)
    assert all(torch.equal(mask, masks[name]) for name, mask in ow.masks(average).items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_average_copied_into_its_model(tmp_path, method):
    """As Lightning does at the end, through `.data`: with and without buffers."""
    model, optimizer = net(method)
    average = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(0.7))
    train(model, optimizer, 2 * EVERY + 1, lambda: average.update_parameters(model))
    means = [*average.module.parameters(), *average.module.buffers()]
    for mean, mine in zip(means, [*model.parameters(), *model.buffers()], strict=True):
        mine.data.copy_(mean.data)
    check_sparse(model, tmp_path)


def test_a_checkpoint_loaded_into_a_copy_keeps_its_stored_mask():
    """Only what changes the weight alone makes the mask of a copy follow it."""
    model, optimizer = net(METHODS[1])
    train(model, optimizer, EVERY + 1)
    stale = ow.masks(model)
    twin = copy.deepcopy(net(METHODS[1])[0])
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(mask, stale[name]) for name, mask in ow.masks(twin).items())
    twin_of_twin = copy.deepcopy(twin)
    assert all(torch.equal(mask, stale[name]) for name, mask in ow.masks(twin_of_twin).items())


def test_a_copy_that_is_attached_keeps_its_masks_for_their_time():
    model = copy.deepcopy(net(METHODS[1])[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ow.attach(optimizer, model)
    seen = [ow.masks(model)]
    train(model, optimizer, EVERY, lambda: seen.append(ow.masks(model)))
    assert all(torch.equal(mask, seen[0][name]) for masks in seen[1:EVERY] for name, mask in masks.items())
    assert any(not torch.equal(mask, seen[0][name]) for name, mask in seen[EVERY].items())


def test_masks_move_with_their_model_and_missing_ones_are_named():
    model, _ = net(ow.ASP())
    meta = copy.deepcopy(model).to("meta")
    assert all(mask.is_meta for mask in ow.masks(meta).values())
    meta.load_state_dict(model.state_dict(), assign=True)
    assert all(torch.equal(mask, ow.masks(model)[name]) for name, mask in ow.masks(meta).items())
    state = model.state_dict()
    del state["0.weight_mask"]
    with pytest.warns(UserWarning, match="dense"):
        model.load_state_dict(state)  # of this one weight
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "4.weight"}
    state["4.weight_mask"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"4\.weight_mask: found shape \(3,\), needed \(8, 32\)"):
        model.load_state_dict(state)
