"""Writes into the weights of a sharded sparse model reach its dense weights, as they do in a dense model: the start
from the meta device is `fully_shard`, `to_empty`, and then the initialization."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import openwork as ow

METHODS = [None, ow.SRSTE(), ow.ASP(), ow.TransposableSRSTE(), ow.MdGf(4)]


def trunc_normal(layer):
    nn.init.trunc_normal_(layer.weight)


def normal_of_data(layer):
    layer.weight.data.normal_()


def scaled(layer):
    with torch.no_grad():
        layer.weight.zero_().add_(1.0)
        layer.weight *= 3.0


def local(layer):
    with torch.no_grad():
        layer.weight.to_local().copy_(torch.arange(0.5, layer.weight.numel()).view(layer.weight.shape))


WRITES = [nn.Linear.reset_parameters, trunc_normal, normal_of_data, scaled, local]


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(method):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    if method:
        ow.sparsify(model, "2:4", method)
    fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(7.0)
    return model


@pytest.mark.parametrize("write", WRITES)
def test_they_reach_the_dense_weights(write):
    written = []
    for method in METHODS:
        model = sharded(method)
        torch.manual_seed(0)
        for layer in (model[0], model[2]):
            write(layer)
        written.append([weight.full_tensor() for weight in model.parameters()])
        model(torch.randn(2, 16)).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        if method and not method.schedule.steps:
            ow.verify(model)
    for weights in written:
        assert not (weights[0] == 7.0).any()
        assert all(torch.equal(a, b) for a, b in zip(weights, written[0], strict=True))


def test_what_is_computed_of_them_is_as_before():
    model = sharded(ow.SRSTE())
    model[0].reset_parameters()
    weight = model[0].weight
    assert isinstance(weight, DTensor)
    assert type(weight * 2) is DTensor
    full = weight.full_tensor()
    assert int((full != 0).sum()) == full.numel() // 2
    assert torch.equal(weight.to_local(), full)
    weight.square().sum().full_tensor().backward()
    assert torch.equal(model[0].parametrizations.weight.original.grad.full_tensor(), 2 * full)
    assert "DTensor" in repr(weight)
