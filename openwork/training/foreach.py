"""What is done to many weights at once: on a GPU one launch for all that have a method and a pattern alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from openwork import kernels
from openwork.ops import foreach_mask
from openwork.training.parametrize import Masked, masked_weights


def keep_all(held: Iterable[tuple[Masked, nn.Parameter]]) -> list[Tensor]:
    """`Masked.keep` of many weights. Those on a GPU that are ranked afresh take one launch for each pattern."""
    held = list(held)
    found: dict[int, Tensor] = {}
    ranked = {i: each for i, each in enumerate(held) if each[0].ranks_in_one_pass(each[1])}
    for pattern, indices in _in_lists(ranked, lambda masked: masked.pattern):
        scores = [held[i][0].method.score(held[i][1].detach()) for i in indices]
        found |= zip(indices, foreach_mask(scores, pattern, [held[i][0].axis for i in indices]), strict=True)
    return [found[i] if i in found else masked.keep(weight) for i, (masked, weight) in enumerate(held)]


def prune_ahead(root: nn.Module) -> None:
    """What a forward of the root begins with: prunes the weights on a GPU that the last forward used.

    Only Parameters that their modules hold now: `torch.func` puts other tensors in their place, and FSDP2 gathers them
    later.
    """
    wanted = (
        (masked, weight)
        for module in root.modules()
        for _, masked, weight in masked_weights(module)
        if masked.cache.wants(masked) and type(weight) is nn.Parameter and masked.ranks_in_one_pass(weight)
    )
    held = dict(enumerate(each for each in wanted if hasattr(each[0].method, "forwards_in_one_pass")))
    for (method, pattern), indices in _in_lists(held, lambda masked: (masked.method, masked.pattern)):
        axes, weights = [held[i][0].axis for i in indices], [held[i][1] for i in indices]
        pruned = method.forwards_in_one_pass(weights, pattern, axes)
        for i, each in zip(indices, pruned, strict=True):
            held[i][0].cache.give(*held[i], each)


def add_gradient_terms(held: Iterable[tuple[Masked, nn.Parameter]], scale: Tensor | None) -> None:
    """`Masked.add_gradient_term` of many weights. On a GPU one launch adds those of one method and pattern."""
    held = [each for each in held if each[1].grad is not None and hasattr(each[0].method, "gradient_term")]
    simple = {i: each for i, each in enumerate(held) if scale is None and each[0].adds_in_one_pass(each[1])}
    simple = {i: each for i, each in simple.items() if hasattr(each[0].method, "add_terms_in_one_pass")}
    done: set[int] = set()
    for (method, pattern), indices in _in_lists(simple, lambda masked: (masked.method, masked.pattern)):
        weights = [held[i][1] for i in indices]
        gradients: Any = [weight.grad for weight in weights]
        method.add_terms_in_one_pass(gradients, weights, pattern, [held[i][0].axis for i in indices])
        done |= set(indices)
    for i, (masked, weight) in enumerate(held):
        if i not in done:
            masked.add_gradient_term(weight, scale)


def _in_lists(
    held: Mapping[int, tuple[Masked, nn.Parameter]], alike: Callable[[Masked], Any]
) -> list[tuple[Any, list[int]]]:
    """Which of the weights one launch can take together, and what they have alike."""
    lists: dict[Any, list[int]] = {}
    for i, (masked, weight) in held.items():
        if kernels.batches(weight):
            lists.setdefault((weight.device, alike(masked)), []).append(i)
    return [(what, indices) for (_, what), indices in lists.items()]
