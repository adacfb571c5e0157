"""Several processes: Lightning's strategy for FSDP2, under which each block and the network are sharded.

A sharded network cannot be finalized. So training works on a sharded one, and its weights are gathered in a full copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from openwork.recipes.config import FSDP2, Common
from openwork.recipes.models import allow_torchvision
from openwork.training.dtensor import placed_like

allow_torchvision()  # lightning imports it through torchmetrics
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, with checkpoints of one file, in which weights have dense names.

    Its own reader, and torch's of full tensors, want the names of parameters, which those of masked weights are not.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(processes, 1, save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process only
        return get_optimizer_state_dict(self._net, optimizer, options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        load_full(self._net, checkpoint.pop("state_dict"))
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        set_optimizer_state_dict(self._net, optimizer, state, options=StateDictOptions(full_state_dict=True))
        return checkpoint

    @property
    def _net(self) -> nn.Module:
        assert self.model is not None
        return self.model


def build_strategy(config: Common) -> Any:
    """What Lightning's trainer takes for `config.strategy`."""
    return FSDP2Strategy(config.devices * config.nodes) if config.strategy == FSDP2 else config.strategy


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


def full_copy(config: Common, net: nn.Module) -> nn.Module:
    """What is evaluated and saved after training `net`: itself, or a copy where training will shard it."""
    return copy.deepcopy(net) if config.strategy == FSDP2 else net


def load_full(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load full tensors into a sharded network; each process takes its part, and nothing travels."""
    sharded = net.state_dict()
    net.load_state_dict({name: placed_like(tensor, sharded[name]) for name, tensor in state.items()})


def _share_statistics(net: nn.Module) -> None:
    """Give all processes the running statistics of the first: each saw other samples, and its own are saved."""
    for buffer in net.buffers():
        if buffer.is_floating_point():
            dist.broadcast(buffer, 0)


def gather(net: nn.Module, full: nn.Module) -> nn.Module:
    """The full copy with the weights of `net`, the same on all processes. Each of them must ask."""
    if full is not net:
        full.load_state_dict(get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)))
        _share_statistics(full)
    return full
