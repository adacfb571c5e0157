"""What is done to many weights at once: one call, on a GPU one launch, for all that have method and pattern alike.

Weights whose mask a kernel finds on the way (`Masked.is_ranked_fused`) go in lists; the others one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from openwork import kernels
from openwork.methods.autograd import straight_through
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_decay, foreach_mask
from openwork.training.parametrize import SparseWeight, sparse_weights


def masks_of(sparse: Iterable[SparseWeight]) -> list[Tensor]:
    """The mask in force of each weight."""
    sparse = list(sparse)
    masks: dict[int, Tensor] = {}
    for (_, _, pattern), indices in _alike(sparse, [each.masked.is_ranked_fused(each.weight) for each in sparse]):
        scores = [sparse[i].weight.detach().abs() for i in indices]
        axes = [sparse[i].masked.phase.axis for i in indices]
        masks |= zip(indices, foreach_mask(scores, pattern, axes), strict=True)
    return [masks[i] if i in masks else each.masked.mask_of(each.weight) for i, each in enumerate(sparse)]


def prune_ahead(root: nn.Module) -> None:
    """What a forward of the root begins with: prunes the weights on a GPU that the last forward used.

    Only Parameters that their modules hold now: `torch.func` puts other tensors in their place, and FSDP2 gathers them
    later.
    """
    ahead = [
        each
        for each in sparse_weights(root)
        if each.masked.cache.wants(each.masked)
        and type(each.weight) is nn.Parameter
        and each.masked.method.sparse
        and each.masked.is_fused(each.weight)
        and kernels.batches(each.weight)
    ]
    for (_, _, pattern), indices in _alike(ahead, [True] * len(ahead)):
        axes = [ahead[i].masked.phase.axis for i in indices]
        pruned = straight_through([ahead[i].weight for i in indices], pattern, axes)
        for i, weight in zip(indices, pruned, strict=True):
            ahead[i].masked.cache.give(ahead[i].masked, ahead[i].weight, weight)


def add_decay(sparse: Iterable[SparseWeight], scale: Tensor | None) -> None:
    """gradient += decay * weight where a method with a decay prunes; the sum's second half times `scale`."""
    sparse = [each for each in sparse if each.weight.grad is not None and each.masked.method.decay]
    fused = [scale is None and _gradient_fused(each) for each in sparse]
    for (_, rate, pattern), indices in _alike(sparse, fused):
        weights = [sparse[i].weight for i in indices]
        gradients: Any = [weight.grad for weight in weights]
        foreach_decay(gradients, weights, rate, pattern, [sparse[i].masked.phase.axis for i in indices])
    for each, done in zip(sparse, fused, strict=True):
        if not done:
            each.masked.add_decay(each.weight, scale)


def _gradient_fused(sparse: SparseWeight) -> bool:
    """Whether a kernel adds the decay to the weight's gradient without making the mask."""
    gradient: Any = sparse.weight.grad
    ranked = sparse.masked.is_ranked_fused(sparse.weight)
    return ranked and gradient.dtype == sparse.weight.dtype and kernels.fuses(gradient)


def _alike(sparse: list[SparseWeight], chosen: list[bool]) -> list[tuple[tuple[Any, float, Pattern], list[int]]]:
    """The chosen weights, by (device, decay, pattern)."""
    lists: dict[Any, list[int]] = defaultdict(list)
    for i, (each, taken) in enumerate(zip(sparse, chosen, strict=True)):
        if taken:
            lists[each.weight.device, each.masked.method.decay, each.masked.phase.pattern].append(i)
    return list(lists.items())
