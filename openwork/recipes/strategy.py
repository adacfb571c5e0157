"""How Lightning shares a recipe's work over processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from openwork.recipes.config import FSDP2, Common
from openwork.recipes.sharding import load_whole


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, with checkpoints of one file, in which weights have dense names.

    Its own reader, and torch's of whole tensors, want the names of parameters, which those of masked weights are not.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(processes, 1, save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process only
        return get_optimizer_state_dict(self._net, optimizer, options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        load_whole(self._net, checkpoint.pop("state_dict"))
        (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
        set_optimizer_state_dict(self._net, optimizer, state, options=StateDictOptions(full_state_dict=True))
        return checkpoint

    @property
    def _net(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model


def build_strategy(config: Common) -> Any:
    """What Lightning's trainer takes for `config.strategy`."""
    return FSDP2Strategy(config.devices * config.nodes) if config.strategy == FSDP2 else config.strategy
