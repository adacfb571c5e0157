"""Make the weights of a model N:M sparse, in place, and make it a plain model again."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwork.kernels.cpu import counts
from openwork.methods import SRSTE, Method, Phase
from openwork.nm.groups import to_rows
from openwork.nm.masks import apply_mask, retained_share
from openwork.ops import foreach_mask, foreach_transposable_mask
from openwork.training.dtensor import is_sharded
from openwork.training.foreach import masks_of, prune_ahead
from openwork.training.forward_cache import ForwardCache
from openwork.training.masked import Masked
from openwork.training.optimizer_watch import OptimizerWatch
from openwork.training.parametrize import (
    mask_weights,
    masked_modules,
    sparse_weights,
    unmask_weights,
    unwrap,
    weight_name,
)
from openwork.training.record import SparsityRecord, sparsity_records, unfinished_weights
from openwork.training.report import Report, Row, keeps_all
from openwork.training.restart import restart
from openwork.training.select import Candidate, check_has_values, decide
from openwork.training.selection import AxisChoice, PatternChoice, Remainder, Selection
from openwork.training.shared_class import plain_class
from openwork.training.try_masks import Tried, try_masks

MaskOf = Callable[[str, Tensor], Tensor | None]
_ENDS_DENSE = "the model ends dense: the table says what is pruned before"
_ONLY_WATCHED = "ow.Dense masks nothing: the table says what its mask would keep"


def sparsify(
    model: nn.Module,
    pattern: Selection | PatternChoice,
    method: Method = SRSTE(),
    *,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    remainder: Remainder = "skip",
    example: Any = None,
    dense: nn.Module | Mapping[str, Tensor] | None = None,
) -> Report:
    """Make every weight that can be N:M sparse so, in place. Returns what became sparse, what did not, and why.

    `pattern`: "2:4" for all, or a mapping from globs to patterns; `exclude`, `axis` and `remainder` are those of
    `Selection`, which may stand in place of all four. `example`: one input (a tensor, a tuple of arguments or a dict of
    keyword arguments), to see along which axis weights of unknown modules are summed, such as experts; to count
    multiply-adds with; and to find weights that are multiplied as something else than they are, such as standardized
    ones: their zeros would be in no product, so they stay dense. `dense`: where the model is a pruned one, what it was
    before (a model or a state dict). Pruned weights start at their dense values, cut below what their group keeps: the
    first mask is that of the pruned network, and can change as training goes on.

    Nothing is excluded by default but what cannot be sparse. Call it after initialization and before `fully_shard`.
    Raises ValueError when nothing can be sparse, a glob matches nothing, the model is sparse already, or `dense` is
    that of another network or of no use to the method.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> sparsify(model, "2:4", exclude=["2"]).skipped
    {'2.weight': "excluded by '2'"}
    >>> int((model[0].weight != 0).sum())
    64
    """
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(f"method={method!r}; needed a method object such as ow.SRSTE(), ow.STE() or ow.ASP()")
    model = unwrap(model)
    check_plain(model)
    selection = selection_of(pattern, exclude, axis, remainder)
    if selection.transposable and not method.transposable:
        raise ValueError(f"transposable=True with {method}, whose masks are not; use ow.TransposableSRSTE()")
    selection = dataclasses.replace(selection, transposable=method.transposable)
    decided = decide(model, selection, example=example)
    title, cache = f"{type(model).__name__}, {method.name}", ForwardCache(prune_ahead)
    masked = {candidate.name: _masked(candidate, method, cache) for candidate in decided if candidate.pattern}
    masks = {name: each.mask_at_end for name, each in masked.items() if method.ends_sparse}
    excluded = tuple(selection.exclude)
    tried = Tried(decided) if example is None else try_masks(model, example, decided, masks, excluded)
    decided = tried.decided
    candidates = {candidate.name: candidate for candidate in decided if candidate.pattern}
    masked = {name: masked[name] for name in candidates}
    if dense is not None:
        restart(candidates, masked, dense)
    report = report_on(model, decided, mask_at_end(masked), tried.macs, title)
    _register(decided, masked)
    hooks = (
        model.register_forward_pre_hook(cache.enter, prepend=True),
        model.register_forward_hook(cache.leave, always_call=True),
    )
    watch = OptimizerWatch(model, method)
    left = {candidate.name: candidate.reason for candidate in decided if not candidate.pattern}
    model.__dict__["_openwork_record"] = SparsityRecord(masked, method, cache, watch, hooks, left, excluded)
    return dataclasses.replace(report, notes=(*notes_on(model, method), *tried.notes))


def finalize(model: nn.Module) -> nn.Module:
    """Make a sparsified model plain again, in place, and return it: original classes, exact zeros, dense names.

    Parameters keep their identity. A model trained with `ow.Dense`, or with a schedule that ends dense, keeps all its
    weights. A model that FSDP2 has sharded is finalized on its gathered state dict instead. Where the method's schedule
    still runs, the weights are pruned as at its end. The record of patterns and exclusions goes with the masks: give
    the `Selection` again to what comes later, as in `ow.verify(model, pattern=selection)`, `ow.save` and `ow.deploy`.
    Raises ValueError when nothing is sparsified.

    >>> import torch
    >>> model = nn.Linear(8, 4)
    >>> _ = sparsify(model, "2:4")
    >>> type(finalize(model).weight).__name__, int((model.weight != 0).sum())
    ('Parameter', 16)
    """
    inner = unwrap(model)
    modules = [module for _, module in masked_modules(inner)]
    if not modules and not sparsity_records(inner):
        raise ValueError(
            f"{type(inner).__name__} is not sparsified: nothing to finalize (ow.project zeroes a plain model)"
        )
    _check_whole(inner, "load its full state dict into a model sparsified alike, and call ow.finalize there")
    for module in modules:
        unmask_weights(module)
    for _, module, record in sparsity_records(inner):
        del module.__dict__["_openwork_record"]
        for hook in record.hooks:
            hook.remove()
        record.watch.end()
    return model


def project(
    model: nn.Module,
    pattern: Selection | PatternChoice,
    *,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    remainder: Remainder = "skip",
    example: Any = None,
) -> Report:
    """Zero the smallest weights of a plain model until it is N:M, in place: after averaging, merging, editing.

    Arguments, errors and report as in `sparsify`; `example` only shows the axes of weights of unknown modules.

    >>> import torch
    >>> model = nn.Linear(4, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    >>> project(model, "2:4").sparse, model.weight.data
    ({'weight': Pattern(n=2, m=4)}, tensor([[ 4., -3.,  0.,  0.]]))
    """
    model = unwrap(model)
    check_plain(model)
    decided = decide(model, selection_of(pattern, exclude, axis, remainder), example=example)
    check_has_values(decided)
    masks = {candidate.name: magnitude_mask(candidate) for candidate in decided if candidate.pattern}
    report = report_on(model, decided, lambda name, _: masks[name], None, f"{type(model).__name__}, projected")
    with torch.no_grad():
        for candidate in decided:
            if candidate.pattern:
                candidate.weight.copy_(apply_mask(candidate.weight, masks[candidate.name]))
    return report


def magnitude_mask(candidate: Candidate) -> Tensor:
    """The mask of the largest magnitudes, of a weight that was decided to be sparse."""
    assert candidate.pattern
    score, pattern, axis = candidate.weight.detach().abs(), candidate.pattern, candidate.axis
    if candidate.output_axis:
        return foreach_transposable_mask([score], pattern, [axis], [candidate.output_axis])[0]
    return foreach_mask([score], pattern, [axis])[0]


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a sparsified model has now, by weight: bool, the weight's shape, True means kept. A method that
    refreshes its masks writes into the stored ones, so they are copied.

    >>> import torch
    >>> model = nn.Linear(4, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    >>> _ = sparsify(model, "2:4")
    >>> masks(model)
    {'weight': tensor([[ True,  True, False, False]])}
    """
    sparse = list(sparse_weights(unwrap(model)))
    return {
        weight.name: mask if weight.masked.mask is None else mask.clone()
        for weight, mask in zip(sparse, masks_of(sparse), strict=True)
    }


def selection_of(
    pattern: Selection | PatternChoice, exclude: Sequence[str], axis: AxisChoice, remainder: Remainder
) -> Selection:
    """The selection that these arguments of a public function are; raises ValueError where one says nothing."""
    if not isinstance(pattern, Selection):
        return Selection(pattern, exclude=exclude, axis=axis, remainder=remainder)
    if exclude or axis != "input" or remainder != "skip":
        raise ValueError("exclude=, axis= and remainder= beside a Selection: put them into it")
    if pattern.pattern is None:
        raise ValueError(f"{pattern} has no pattern; needed the one to make weights sparse at, such as '2:4'")
    return pattern


def _masked(candidate: Candidate, method: Method, cache: ForwardCache) -> Masked:
    assert candidate.pattern
    return Masked(method, Phase(candidate.pattern, candidate.axis, candidate.output_axis), cache, candidate.weight)


def _register(decided: list[Candidate], masked: Mapping[str, Masked]) -> None:
    """Change the model, once nothing can fail any more."""
    of_module: dict[nn.Module, dict[str, Masked]] = defaultdict(dict)
    for candidate in decided:
        if candidate.pattern:
            of_module[candidate.module][candidate.tensor_name] = masked[candidate.name]
    for module, its in of_module.items():
        mask_weights(module, its)


def check_plain(model: nn.Module) -> None:
    """Raises ValueError where a weight is masked already, or sharded."""
    taken = [name or plain_class(module).__name__ for name, module in masked_modules(model)]
    if taken:
        raise ValueError(
            f"{', '.join(taken[:3])} sparsified already; call ow.finalize(model) first, or sparsify other modules"
        )
    _check_whole(model, "call ow.sparsify before fully_shard (masks need whole groups)")


def _check_whole(model: nn.Module, remedy: str) -> None:
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"{weight_name(name)} is sharded: {remedy}")


def notes_on(model: nn.Module, method: Method) -> tuple[str, ...]:
    running = sorted(set(unfinished_weights(model).values()))
    if not method.sparse:
        return (_ONLY_WATCHED, *running)
    return (_ENDS_DENSE, *running) if method.schedule.ends_dense else tuple(running)


def mask_at_end(masked: Mapping[str, Masked]) -> MaskOf:
    """What `report_on` asks of weights that are about to be masked, or are."""
    return lambda name, weight: None if masked[name].keeps_largest(weight) else masked[name].mask_at_end(weight)


def report_on(
    model: nn.Module, decided: list[Candidate], mask_of: MaskOf, macs: dict[str, int] | None, title: str
) -> Report:
    """The report on these candidates. `mask_of(name, weight)`: the mask that a weight has, or will have in the end;
    None where it keeps the largest magnitudes, and need not be made for a report."""
    products = {candidate.name: None if macs is None else macs.get(candidate.name, 0) for candidate in decided}
    rows = tuple(_row(candidate, products[candidate.name], mask_of) for candidate in decided)
    seen = {id(candidate.weight) for candidate in decided}
    others = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return Report(rows, title, others, macs.get("", 0) if macs else 0)


def _row(candidate: Candidate, macs: int | None, mask_of: MaskOf) -> Row:
    weight, pattern = candidate.weight.detach(), candidate.pattern
    shape, bits = tuple(weight.shape), weight.element_size() * 8
    if not pattern:
        return Row(candidate.name, shape, None, candidate.reason, weight.numel(), 1.0, 0, bits, macs)
    rows, mask = to_rows(weight, candidate.axis), mask_of(candidate.name, weight)
    K, lines = rows.shape[-1], rows[..., 0].numel()
    kept = lines * (K // pattern.m * pattern.n + min(K % pattern.m, pattern.n))
    if mask is None:
        share = counts.retained_share(weight, pattern, candidate.axis)
    else:
        kept = kept if mask.is_meta else int(mask.sum())  # transposable tiles that stick out keep fewer
        share = retained_share(weight, mask)
    groups = lines * math.ceil(K / pattern.m)
    return Row(candidate.name, shape, pattern, keeps_all(pattern), kept, share, groups, bits, macs)
