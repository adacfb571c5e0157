"""A sharded network of a recipe: continued from a checkpoint of whole tensors, and gathered."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import openwork as ow
from openwork.recipes.parallel import blocks, gather, load_full, shard

RANKS = 2
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


class Net(nn.Module):
    """(B, 8) -> (B, 4), with running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.layers(x)))


def built():
    torch.manual_seed(0)
    net = Net()
    ow.sparsify(net, "2:4", ow.SRSTE(decay=0.5))
    return net


def sharded():
    net = built()
    shard(net, init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ow.attach(optimizer, net)
    return net, optimizer


def train(net, optimizer, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        net(torch.randn(4, 8, generator=draw)).square().mean().backward()
        optimizer.step()


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    net, optimizer = sharded()
    train(net, optimizer, range(3))
    saved = [get_model_state_dict(net, options=FULL), get_optimizer_state_dict(net, optimizer, options=FULL)]
    if rank == 0:
        torch.save(saved, folder / "checkpoint.pt")
    dist.barrier()
    weights, state = torch.load(folder / "checkpoint.pt", weights_only=True)
    again, its_optimizer = sharded()
    load_full(again, weights)
    set_optimizer_state_dict(again, its_optimizer, state, options=StateDictOptions(full_state_dict=True))
    third, _ = sharded()
    set_model_state_dict(third, dict(weights), options=StateDictOptions(full_state_dict=True))
    ends = [gather(net, built()).state_dict(), gather(third, built()).state_dict()]
    for each in ((net, optimizer), (again, its_optimizer)):
        train(*each, range(3, 5))
        ends.append(gather(each[0], built()).state_dict())
    torch.save([weights, *ends], folder / f"{rank}.pt")
    dist.destroy_process_group()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_sharded_network_goes_on_from_whole_tensors_and_is_gathered(tmp_path):
    mp.spawn(one_rank, (tmp_path,), nprocs=RANKS)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert all(map(same, one, other))  # also the statistics
    saved, before, loaded, end, resumed = one
    assert same(saved, before)
    assert same(saved, loaded)
    assert same(resumed, end)
    assert not same(end, before)
    assert list(end) == list(Net().state_dict())


def test_blocks_are_what_the_outermost_lists_hold():
    net = Net()
    assert list(blocks(net)) == [net.layers[0], net.layers[2]]
    ow.sparsify(net, "2:4", exclude=["layers.2"])
    assert list(blocks(net)) == [net.layers[0], net.layers[2]]
