"""What is done to many weights at once: one call, on a GPU one launch, for all that have method and pattern alike.

Weights whose mask a kernel finds on the way (`Masked.is_ranked_fused`) go in lists; the others one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwork import kernels
from openwork.kernels.cpu.masks import decay_into
from openwork.methods.autograd import straight_through
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_decay, foreach_mask
from openwork.training.parametrize import SparseWeight, sparse_weights


def masks_of(weights: Iterable[SparseWeight]) -> list[Tensor]:
    """The mask in force of each weight."""
    weights = list(weights)
    masks: dict[int, Tensor] = {}
    together = [kernels.batches(each.weight) and each.masked.is_ranked_fused(each.weight) for each in weights]
    for (_, _, pattern), indices in _alike(weights, together):
        scores = [weights[i].weight.detach().abs() for i in indices]
        axes = [weights[i].masked.phase.axis for i in indices]
        masks |= zip(indices, foreach_mask(scores, pattern, axes), strict=True)
    return [masks[i] if i in masks else sparse.masked.mask_of(sparse.weight) for i, sparse in enumerate(weights)]


def prune_ahead(root: nn.Module) -> None:
    """What a forward of the root begins with: prunes the weights on a GPU that the last forward used.

    Only Parameters that their modules hold now: `torch.func` puts other tensors in their place, and FSDP2 gathers them
    later.
    """
    ahead = [
        sparse
        for sparse in sparse_weights(root)
        if sparse.masked.cache.wants(sparse.masked)
        and type(sparse.weight) is nn.Parameter
        and sparse.masked.method.sparse
        and sparse.masked.is_fused(sparse.weight)
        and kernels.batches(sparse.weight)
    ]
    for (_, _, pattern), indices in _alike(ahead, [True] * len(ahead)):
        axes = [ahead[i].masked.phase.axis for i in indices]
        pruned = straight_through([ahead[i].weight for i in indices], pattern, axes)
        for i, weight in zip(indices, pruned, strict=True):
            ahead[i].masked.cache.give(ahead[i].masked, ahead[i].weight, weight)


def decayed_copy(sparse: SparseWeight, rate: float) -> Tensor | None:
    """gradient + rate * weight where pruned, in one pass; None where no kernel does that."""
    gradient: Any = sparse.weight.grad
    if (
        gradient.device.type != "cpu"
        or kernels.batches(gradient)
        or gradient.requires_grad
        or not _gradient_fused(sparse)
    ):
        return None
    copy, phase = torch.empty_like(gradient), sparse.masked.phase
    return copy if decay_into(copy, gradient, sparse.weight, rate, phase.pattern, phase.axis) else None


def add_decay(weights: Sequence[SparseWeight], signs: Sequence[int], scale: Tensor | None) -> None:
    """gradient += sign * decay * weight where a method with a decay prunes; the sum's second half times `scale`."""
    decayed = [scale is None and sparse.masked.method.decay != 0 and _gradient_fused(sparse) for sparse in weights]
    for (_, rate, pattern), indices in _alike(weights, decayed, signs):
        dense = [weights[i].weight for i in indices]
        gradients: Any = [weight.grad for weight in dense]
        foreach_decay(gradients, dense, rate, pattern, [weights[i].masked.phase.axis for i in indices])
    for sparse, sign, done in zip(weights, signs, decayed, strict=True):
        if sparse.masked.method.decay and not done:
            sparse.masked.add_decay(sparse.weight, sign * sparse.masked.method.decay, scale)


def _gradient_fused(sparse: SparseWeight) -> bool:
    """Whether a kernel adds the decay to the weight's gradient without making the mask."""
    gradient: Any = sparse.weight.grad
    ranked = sparse.masked.is_ranked_fused(sparse.weight)
    return ranked and gradient.dtype == sparse.weight.dtype and kernels.fuses(gradient)


def _alike(
    weights: Sequence[SparseWeight], chosen: Sequence[bool], signs: Sequence[int] = ()
) -> list[tuple[tuple[Any, float, Pattern], list[int]]]:
    """The chosen weights, by (device, decay with its sign, pattern)."""
    lists: dict[Any, list[int]] = defaultdict(list)
    for i, (sparse, taken) in enumerate(zip(weights, chosen, strict=True)):
        if taken:
            rate = sparse.masked.method.decay * (signs[i] if signs else 1)
            lists[sparse.weight.device, rate, sparse.masked.phase.pattern].append(i)
    return list(lists.items())
