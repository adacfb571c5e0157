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


def masks_at_end(weights: Iterable[SparseWeight]) -> list[Tensor]:
    """The mask that each weight has at its pattern: the one in force, or, while a schedule has another or where it ends
    dense, the one that would be."""
    weights = list(weights)
    in_force = iter(masks_of(each for each in weights if not each.masked.schedule.length))
    return [each.masked.mask_at_end(each.weight) if each.masked.schedule.length else next(in_force) for each in weights]


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
    rates = [sign * added_decay(sparse) for sparse, sign in zip(weights, signs, strict=True)]
    decayed = [
        scale is None and rate != 0 and _gradient_fused(sparse) for sparse, rate in zip(weights, rates, strict=True)
    ]
    for (_, rate, pattern), indices in _alike(weights, decayed, rates):
        dense = [weights[i].weight for i in indices]
        gradients: Any = [weight.grad for weight in dense]
        foreach_decay(gradients, dense, rate, pattern, [weights[i].masked.phase.axis for i in indices])
    for sparse, rate, done in zip(weights, rates, decayed, strict=True):
        if rate and not done:
            gradient: Any = sparse.weight.grad
            sparse.masked.add_decay(gradient, sparse.weight, rate, scale)


def added_decay(sparse: SparseWeight) -> float:
    """The decay that is part of the gradient."""
    method = sparse.masked.method
    return 0.0 if method.decoupled else method.decay


def decay_weights(weights: Sequence[SparseWeight], rates: Sequence[float | Tensor], skipped: Tensor | None) -> None:
    """weight -= rate * decay * weight where a method with a decoupled decay prunes, in place; nothing where `skipped`
    is not 0. `rates`: learning rates."""
    factors = [_factor(rate, skipped) for rate in rates]
    terms = [
        -sparse.masked.method.decay * (1.0 if isinstance(rate, Tensor) and not _is_here(rate) else float(rate))
        for sparse, rate in zip(weights, rates, strict=True)
    ]
    together = [
        factor is None and sparse.masked.is_ranked_fused(sparse.weight)
        for sparse, factor in zip(weights, factors, strict=True)
    ]
    for (_, term, pattern), indices in _alike(weights, together, terms):
        dense = [weights[i].weight for i in indices]
        changes = [torch.zeros_like(weight) for weight in dense]
        foreach_decay(changes, dense, term, pattern, [weights[i].masked.phase.axis for i in indices])
        for weight, change in zip(dense, changes, strict=True):
            weight.add_(change)
    for sparse, term, factor, done in zip(weights, terms, factors, together, strict=True):
        if not done:
            sparse.masked.add_decay(sparse.weight, sparse.weight, term, factor)


def _factor(rate: float | Tensor, skipped: Tensor | None) -> Tensor | None:
    """What a term is multiplied with on its device, without waiting for it: a rate that lies there, and 0 where the
    step is skipped."""
    there = rate.reshape(()) if isinstance(rate, Tensor) and not _is_here(rate) else None
    if skipped is None:
        return there
    active = (skipped.reshape(()) <= 0).float()
    return active if there is None else active * there.to(active.device)


def _is_here(rate: Tensor) -> bool:
    """Whether its number may be asked for without waiting for a device."""
    return rate.device.type == "cpu" and not torch.compiler.is_compiling()


def _gradient_fused(sparse: SparseWeight) -> bool:
    """Whether a kernel adds the decay to the weight's gradient without making the mask."""
    gradient: Any = sparse.weight.grad
    ranked = sparse.masked.is_ranked_fused(sparse.weight)
    return ranked and gradient.dtype == sparse.weight.dtype and kernels.fuses(gradient)


def _alike(
    weights: Sequence[SparseWeight], chosen: Sequence[bool], rates: Sequence[float] = ()
) -> list[tuple[tuple[Any, float, Pattern], list[int]]]:
    """The chosen weights, by (device, rate, pattern)."""
    lists: dict[Any, list[int]] = defaultdict(list)
    for i, (sparse, taken) in enumerate(zip(weights, chosen, strict=True)):
        if taken:
            lists[sparse.weight.device, rates[i] if rates else 0.0, sparse.masked.phase.pattern].append(i)
    return list(lists.items())
