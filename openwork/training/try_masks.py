"""Run an example with the weights that the masks would leave, before anything is changed: what it costs, and whether
the zeros reach the products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from openwork.nm.masks import apply_mask
from openwork.training.accounting import Accounts, Declared
from openwork.training.matmul_trace import count_macs
from openwork.training.select import Candidate, check_some_sparse


@dataclass(frozen=True)
class Tried:
    """`decided` without the weights whose zeros reach no product; multiply-adds by weight; what to tell."""

    decided: list[Candidate]
    macs: dict[str, int] | None = None
    notes: tuple[str, ...] = ()


def try_masks(
    model: nn.Module,
    example: Any,
    decided: list[Candidate],
    masks: Mapping[str, Callable[[Tensor], Tensor]],
    exclude: tuple[str, ...],
) -> Tried:
    """Find the weights that are multiplied as something else than they are: standardized in the forward pass, along
    another axis, or as a factor of a weight. `masks` has the mask of each by its name; none where nothing is masked.
    Raises ValueError where no weight is left."""
    weights = {c.name: c.weight for c in decided if not c.factor or c.factor.direction}
    chosen = {c.name: (c.pattern, c.axis) for c in decided if c.pattern and c.name in masks and not c.weight.is_meta}
    shapes = {name: tuple(weights[name].shape) for name in chosen}
    declared = {candidate.name: candidate.reason for candidate in decided}
    accounts = Accounts(chosen, shapes, Declared(declared, exclude))
    with _as_masked({weights[name]: masks[name] for name in chosen}):
        macs = count_macs(model, example, weights, accounts.visit if chosen else None)
    lost = {name: what for name, what in accounts.problems.items() if name not in accounts.sparse_names}
    left = [
        replace(each, pattern=None, output_axis=None, reason=f"its zeros reach no product: {lost[each.name]}")
        if each.name in lost
        else each
        for each in decided
    ]
    if lost:
        check_some_sparse(model, left)
    notes = [f"{name} is also {what}" for name, what in accounts.problems.items() if name not in lost]
    notes += [f"dense, and no weight of the table: {name} {what}" for name, what in accounts.unaccounted.items()]
    return Tried(left, macs, tuple(notes))


@contextlib.contextmanager
def _as_masked(masks: Mapping[Tensor, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Each weight is pruned inside, and afterwards the very memory that it was."""
    before = {weight: weight.data for weight in masks}
    try:
        for weight, mask_of in masks.items():
            weight.data = apply_mask(weight.data, mask_of(weight.data))
        yield
    finally:
        for weight, data in before.items():
            weight.data = data
