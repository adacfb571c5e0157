"""Change the pattern of weights while they train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import nn

from openwork.nm.groups import reduction_size
from openwork.nm.pattern import Pattern, within_2_4
from openwork.training.parametrize import SparseWeight, masked_modules, sparse_weights, unwrap
from openwork.training.record import sparsity_records
from openwork.training.report import Report
from openwork.training.select import Candidate
from openwork.training.selection import PatternChoice, Selection, matches
from openwork.training.sparsify import mask_at_end, notes_on, report_on
from openwork.utils.counted import counted


def change_pattern(model: nn.Module, pattern: PatternChoice, *, remainder: Literal["error", "pad"] = "error") -> Report:
    """Go on training sparse weights at other patterns, in place. Returns what each is from now on.

    `pattern`: "1:8" for all, or a mapping from globs to patterns, the first match deciding; weights that none matches
    keep theirs. Only weights that are sparse change; "4:4" lets one be dense. `remainder`: where M does not divide an
    axis, "error" or "pad" the last group.

    Call it between two steps, on every process. Weights, optimizer, its state, handles and topology stay; so does the
    clock of the method's schedule, which now ends at the new pattern. Stored masks, and what the method keeps for a
    weight, are made anew. `verify`, `save` and `finalize` hold the model to the new pattern, and its state dict has it
    (`<weight>_pattern`), so that a resumed run goes on with it whatever `sparsify` was given. Raises ValueError, and
    changes nothing, where a glob matches no sparse weight, M does not divide an axis, or a layer of `ow.accelerate`
    would not be within 2:4.

    >>> import openwork as ow
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> _ = ow.sparsify(model, "2:4")
    >>> change_pattern(model, {"2": "1:8"}).sparse
    {'0.weight': Pattern(n=2, m=4), '2.weight': Pattern(n=1, m=8)}
    >>> int((model[2].weight != 0).sum())
    16
    """
    model = unwrap(model)
    if not sparsity_records(model):
        known = any(True for _ in masked_modules(model))
        remedy = "hand over the model that ow.sparsify got, and name this part by a glob" if known else "ow.sparsify it"
        raise ValueError(f"{type(model).__name__} has no pattern that could be changed: {remedy}")
    if remainder not in ("error", "pad"):
        raise ValueError(f"remainder={remainder!r}; needed 'error' or 'pad'")
    weights = list(sparse_weights(model))
    chosen = _chosen(weights, Selection(pattern))
    for sparse in weights:
        if sparse.name in chosen:
            _check(sparse, chosen[sparse.name], remainder)
    for sparse in weights:
        if sparse.name in chosen:
            sparse.masked.change_pattern(chosen[sparse.name], sparse.weight)
    return _report(model, weights)


def _chosen(weights: list[SparseWeight], selection: Selection) -> Mapping[str, Pattern]:
    for glob in selection.patterns:
        if not any(matches(glob, sparse.name) for sparse in weights):
            names = ", ".join(sparse.name for sparse in weights[:5])
            raise ValueError(f"pattern glob {glob!r} matches no sparse weight; there are {names}")
    named = {sparse.name: selection.pattern_of(sparse.name) for sparse in weights}
    return {name: pattern for name, pattern in named.items() if pattern}


def _check(sparse: SparseWeight, pattern: Pattern, remainder: str) -> None:
    end, shape = sparse.masked.end, tuple(sparse.weight.shape)
    for axis in (end.axis, end.output_axis):
        length = reduction_size(shape, axis) if axis else 0
        padded = remainder == "pad" and length > 1
        if length % pattern.m and not padded:
            raise ValueError(
                f"{sparse.name} {shape}: an axis has {counted(length, 'weight')}, not a multiple of {pattern.m}; give "
                f"it another pattern, such as {{{sparse.name!r}: '{end.pattern}', '*': '{pattern}'}}, or use "
                "remainder='pad'"
            )
    if "_openwork_matmul" in sparse.module.__dict__ and not within_2_4(pattern):
        raise ValueError(
            f"{sparse.name} multiplies on sparse tensor cores (ow.accelerate), which take patterns within 2:4, not "
            f"{pattern}"
        )


def _report(model: nn.Module, weights: list[SparseWeight]) -> Report:
    candidates = [
        Candidate(
            sparse.name.removesuffix(sparse.tensor_name).rstrip("."),
            sparse.module,
            sparse.tensor_name,
            sparse.weight,
            sparse.masked.end.pattern,
            sparse.masked.end.axis,
            sparse.masked.end.output_axis,
        )
        for sparse in weights
    ]
    masked = {sparse.name: sparse.masked for sparse in weights}
    title = f"{type(model).__name__}, at other patterns"
    title = f"{type(model).__name__}, at other patterns"
    report = report_on(model, candidates, mask_at_end(masked), None, title)
    return dataclasses.replace(report, notes=notes_on(model, weights[0].masked.method))
