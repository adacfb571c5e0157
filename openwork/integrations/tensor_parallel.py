"""Tensor parallelism: torch's two styles for linear layers, for sparsified ones.

ow.sparsify(model, "2:4", ow.SRSTE())
plan = {"layers.*.linear1": Colwise(), "layers.*.linear2": Rowwise()}
parallelize_module(model, mesh, plan)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)     # torch: foreach takes no mixture
ow.attach(optimizer, model)
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from openwork.training.dtensor import keeps_groups
from openwork.training.masked import Masked
from openwork.training.parametrize import masked_weights


class Colwise(ColwiseParallel):
    """Each process has some outputs of a linear layer, sparsified or plain; its groups stay whole. Arguments as in
    torch's `ColwiseParallel`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return super()._apply(_admitted(module), device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(module, device_mesh, Shard(0), Shard(0), self.src_data_rank)


class Rowwise(RowwiseParallel):
    """Each process has some inputs of a linear layer, sparsified or plain. Arguments as in torch's `RowwiseParallel`.

    Raises ValueError where the cut would go through a group of M.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return super()._apply(_admitted(module), device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(module, device_mesh, Shard(1), Replicate(), self.src_data_rank)


def _admitted(module: nn.Module) -> nn.Module:
    """The module, marked as one that may be split: a sparsified one refuses the styles that do not know it."""
    module.__dict__.setdefault("_distribute_module_applied", False)
    return module


def _split(module: nn.Module, mesh: DeviceMesh, weight: Placement, bias: Placement, source: int | None) -> None:
    """Called by torch for the layer and for each module in it: the dense weight behind a mask is in one of them."""
    for _, masked, dense in masked_weights(module):
        _check_whole_groups(dense, masked, weight, mesh)
        lists: Any = module.parametrizations
        lists.weight.original = _spread(dense, mesh, weight, source)
    if isinstance(module, nn.Linear):
        for name, placement in {"weight": weight, "bias": bias}.items():
            if module._parameters.get(name) is not None:
                module._parameters[name] = _spread(module._parameters[name], mesh, placement, source)


def _spread(parameter: Any, mesh: DeviceMesh, placement: Placement, source: int | None) -> nn.Parameter:
    spread = distribute_tensor(parameter, mesh, [placement], src_data_rank=source)
    return nn.Parameter(spread, requires_grad=parameter.requires_grad)


def _check_whole_groups(weight: nn.Parameter, masked: Masked, placement: Placement, mesh: DeviceMesh) -> None:
    if not keeps_groups(weight, [(placement, mesh.size())], masked.end.axis, masked.end.pattern.m):
        raise ValueError(
            f"splitting a weight {tuple(weight.shape)} over {mesh.size()} processes by {placement} cuts groups of "
            f"{masked.end.pattern.m} apart: take Colwise for this layer, another number of processes, or exclude it"
        )
