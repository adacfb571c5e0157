"""FSDP2 for the recipes: each block and the network are sharded.

A sharded network cannot be finalized. So training works on a sharded one, and its weights are gathered in a whole copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from openwork.recipes.config import FSDP2, Common
from openwork.training.dtensor import placed_like


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network in place: each of its blocks, then the rest at once."""
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of a network hold, as far as it has weights.

    >>> [type(block).__name__ for block in blocks(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))]
    ['Sequential']
    """
    for child in net.children():
        if isinstance(net, nn.Sequential | nn.ModuleList):
            yield from [child] if any(True for _ in child.parameters()) else []
        else:
            yield from blocks(child)


def whole_twin(config: Common, net: nn.Module) -> nn.Module:
    """What is evaluated and saved after training `net`: itself, or a copy where training will shard it."""
    return copy.deepcopy(net) if config.strategy == FSDP2 else net


def load_whole(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a sharded network; each process takes its part, and nothing travels."""
    sharded = net.state_dict()
    net.load_state_dict({name: placed_like(tensor, sharded[name]) for name, tensor in state.items()})


def share_statistics(net: nn.Module) -> None:
    """Give all processes the running statistics of the first: each saw other samples, and its own are saved."""
    for buffer in net.buffers():
        if buffer.is_floating_point():
            dist.broadcast(buffer, 0)


def gather(net: nn.Module, twin: nn.Module) -> nn.Module:
    """The whole twin with the weights of `net`, the same on all processes. Each of them must ask."""
    if twin is not net:
        twin.load_state_dict(get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)))
        share_statistics(twin)
    return twin
