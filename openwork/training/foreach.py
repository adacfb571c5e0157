"""What is done to many weights at once: on a GPU one launch for all that have a method and a pattern alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from openwork import kernels
from openwork.ops import foreach_mask
from openwork.training.parametrize import Masked, SparseWeight, sparse_weights


def keep_all(sparse: Iterable[SparseWeight]) -> list[Tensor]:
    """`Masked.keep` of many weights. Those on a GPU that are ranked afresh take one launch for each pattern."""
    sparse = list(sparse)
    masks: dict[int, Tensor] = {}
    ranked = {i: each for i, each in enumerate(sparse) if each.masked.ranks_in_one_pass(each.weight)}
    for pattern, indices in _in_lists(ranked, lambda masked: masked.pattern):
        scores = [sparse[i].masked.method.score(sparse[i].weight.detach()) for i in indices]
        axes = [sparse[i].masked.axis for i in indices]
        masks |= zip(indices, foreach_mask(scores, pattern, axes), strict=True)
    return [masks[i] if i in masks else each.masked.keep(each.weight) for i, each in enumerate(sparse)]


def prune_ahead(root: nn.Module) -> None:
    """What a forward of the root begins with: prunes the weights on a GPU that the last forward used.

    Only Parameters that their modules hold now: `torch.func` puts other tensors in their place, and FSDP2 gathers them
    later.
    """
    wanted = (
        each
        for each in sparse_weights(root)
        if each.masked.cache.wants(each.masked)
        and type(each.weight) is nn.Parameter
        and each.masked.ranks_in_one_pass(each.weight)
    )
    ahead = dict(enumerate(each for each in wanted if hasattr(each.masked.method, "forwards_in_one_pass")))
    for (method, pattern), indices in _in_lists(ahead, lambda masked: (masked.method, masked.pattern)):
        axes, weights = [ahead[i].masked.axis for i in indices], [ahead[i].weight for i in indices]
        pruned = method.forwards_in_one_pass(weights, pattern, axes)
        for i, result in zip(indices, pruned, strict=True):
            ahead[i].masked.cache.give(ahead[i].masked, ahead[i].weight, result)


def add_gradient_terms(sparse: Iterable[SparseWeight], scale: Tensor | None) -> None:
    """`Masked.add_gradient_term` of many weights. On a GPU one launch adds those of one method and pattern."""
    sparse = [each for each in sparse if each.weight.grad is not None and hasattr(each.masked.method, "gradient_term")]
    simple = {i: each for i, each in enumerate(sparse) if scale is None and each.masked.adds_in_one_pass(each.weight)}
    simple = {i: each for i, each in simple.items() if hasattr(each.masked.method, "add_terms_in_one_pass")}
    done: set[int] = set()
    for (method, pattern), indices in _in_lists(simple, lambda masked: (masked.method, masked.pattern)):
        weights = [sparse[i].weight for i in indices]
        gradients: Any = [weight.grad for weight in weights]
        method.add_terms_in_one_pass(gradients, weights, pattern, [sparse[i].masked.axis for i in indices])
        done |= set(indices)
    for i, each in enumerate(sparse):
        if i not in done:
            each.masked.add_gradient_term(each.weight, scale)


def _in_lists(sparse: Mapping[int, SparseWeight], alike: Callable[[Masked], Any]) -> list[tuple[Any, list[int]]]:
    """Which of the weights one launch can take together, and what they have alike."""
    lists: dict[Any, list[int]] = {}
    for i, each in sparse.items():
        if kernels.batches(each.weight):
            lists.setdefault((each.weight.device, alike(each.masked)), []).append(i)
    return [(what, indices) for (_, what), indices in lists.items()]
