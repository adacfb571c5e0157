"""Weights spread over processes (torch's DTensor: FSDP2, tensor parallelism), handled shard by shard.

A shard that holds whole groups is masked where it is, and nothing travels. Where the sharded axis cuts groups apart (a
transposed convolution or transformers' Conv1D under FSDP2), the weight is gathered for its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from openwork.methods import Method, Phase
from openwork.nm.groups import Axis, reduction_size


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor. Asked by name: importing the class would take as long as all of openwork."""
    return type(tensor).__name__ == "DTensor"


def full_tensor(tensor: Any) -> Tensor:
    """The tensor itself, gathered from all processes if it is spread over them: each of them must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def elementwise(function: Callable[..., Tensor], weight: Any, *others: Any) -> Tensor:
    """`function(weight, *others)`, which treats each position alone. The result is placed like `weight`."""
    if not is_sharded(weight):
        return function(weight, *others)
    return _spread(function(weight.to_local(), *(other.to_local() for other in others)), weight)


def by_groups(
    function: Callable[[Tensor], Tensor], weight: Any, axis: Axis, m: int, *, gathered: bool = False
) -> Tensor:
    """`function(weight)`, which treats each group alone and keeps the shape, or, `gathered`, looks at all of it. The
    result is placed like `weight`."""
    if not is_sharded(weight):
        return function(weight)
    if gathered or cuts_groups(weight, axis, m):
        return placed_like(function(weight.full_tensor()), weight)
    return _spread(function(weight.to_local()), weight)


def cuts_groups(weight: Any, axis: Axis, m: int) -> bool:
    """Whether the weight is sharded so that a group of `m` lies on several processes."""
    if not is_sharded(weight):
        return False
    return not keeps_groups(weight, list(zip(weight.placements, weight.device_mesh.shape, strict=True)), axis, m)


def placed_like(tensor: Any, weight: Any) -> Tensor:
    """A tensor that every process has whole, spread over them as `weight` is. Nothing travels."""
    if not is_sharded(weight):
        return tensor
    if is_sharded(tensor):
        return tensor.redistribute(weight.device_mesh, weight.placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


def keeps_groups(weight: Tensor, placements: list[tuple[Any, int]], axis: Axis, m: int) -> bool:
    """Whether every group of `m` stays in one part, where each of `placements` cuts the weight into so many parts."""
    cuts = [(placement, parts) for placement, parts in placements if parts > 1 and _cuts_along(placement, axis)]
    if len(cuts) != 1:
        return not cuts
    placement, parts = cuts[0]
    even = type(placement).__name__ == "Shard" and axis.blocks == 1 and not axis.flat
    K = reduction_size(tuple(weight.shape), axis)
    return even and -(-K // parts) % m == 0  # torch cuts into parts of ceil(K / parts)


def _cuts_along(placement: Any, axis: Axis) -> bool:
    return not placement.is_replicate() and (axis.flat or getattr(placement, "dim", axis.dim) == axis.dim)


def _spread(local: Tensor, weight: Any) -> Tensor:
    """This process's part of a tensor, as part of one that is placed like `weight`."""
    kind: Any = type(weight)
    shape, stride = weight.shape, weight.stride()
    return kind.from_local(local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)


def check_whole_groups(weight: Any, method: Method, phase: Phase) -> None:
    """Raises ValueError where sharding cuts apart what a method needs whole: groups, or the weight."""
    if method.whole and is_sharded(weight) and not all(placement.is_replicate() for placement in weight.placements):
        raise ValueError(
            f"{method} needs whole weights, and one of {tuple(weight.shape)} is sharded {weight.placements}: it can be "
            "read in a forward under fully_shard, or once its full state dict is loaded into a model sparsified alike"
        )
    if cuts_groups(weight, phase.axis, phase.pattern.m):
        raise ValueError(
            f"{method} needs whole groups of {phase.pattern.m}, and sharding {weight.placements} of a "
            f"weight {tuple(weight.shape)} cuts them apart: shard along another axis, or take another method"
        )


def differ(before: Tensor, after: Tensor) -> bool:
    """Whether the values of two tensors differ, wherever each lies."""
    if before.is_meta or after.is_meta:
        return before.is_meta != after.is_meta
    before = before.to(after)
    return bool(((before != after) & ~(before.isnan() & after.isnan())).any())
