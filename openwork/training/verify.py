"""Prove that a model is as sparse as its patterns say: its weights, and what really reaches its matmuls."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from openwork.kernels.cpu.counts import group_counts, too_dense
from openwork.nm.groups import Axis, reduction_size
from openwork.nm.masks import GroupCounts
from openwork.nm.pattern import Pattern
from openwork.training.accounting import Accounts, Declared, values_of
from openwork.training.known_layers import UNKNOWN
from openwork.training.matmul_trace import watch
from openwork.training.parametrize import plain_name, unwrap, weight_name
from openwork.training.record import (
    recorded_dense,
    recorded_excludes,
    recorded_output_axes,
    recorded_weights,
    sparsity_records,
    unfinished_weights,
)
from openwork.training.report import Report, Row, keeps_all
from openwork.training.select import HELD, Candidate, check_some_sparse, decide
from openwork.training.selection import PatternChoice, Selection
from openwork.training.shared_class import plain_class
from openwork.training.weight_norm import LENGTHS
from openwork.utils.caller import outside
from openwork.utils.counted import counted

_GUESSES = tuple(2**i for i in range(1, 7))  # group sizes tried when no pattern is given
_DENSE = "no N:M pattern with N < M holds"
_ALLOW = "what is to stay dense is named by allow_dense=[...], or by exclude= where the patterns are given; '*' is all"
_Recorded = dict[str, tuple[Pattern, Axis]]
_EXCLUDE = "layers that are to stay dense are left out by pattern=ow.Selection('2:4', exclude=[...])"


class NotSparse(ValueError):
    """Raised by `verify`. `layers`: name of each weight that is denser than its pattern, and of each product that is
    not accounted for -> what was found. `unaccounted`: which of them are products. `advice` says what to do.

    >>> import torch, openwork as ow
    >>> try:
    ...     ow.verify(torch.nn.Linear(4, 1), pattern="2:4")
    ... except ow.NotSparse as error:
    ...     list(error.layers)
    ['weight']
    """

    def __init__(self, layers: dict[str, str], advice: str = "", unaccounted: Collection[str] = ()):
        self.layers, self.unaccounted = layers, frozenset(unaccounted)
        denser = [f"  {name}: {problem}" for name, problem in layers.items() if name not in self.unaccounted]
        others = [f"  {name}: {problem}" for name, problem in layers.items() if name in self.unaccounted]
        too_dense = "weight is denser than its pattern:", "weights are denser than their pattern:"
        unknown = "product is not accounted for:", "products are not accounted for:"
        lines = [counted(len(denser), *too_dense), *denser] if denser else []
        lines += [counted(len(others), *unknown), *others] if others else []
        super().__init__("\n".join([*lines, *([advice] if advice else [])]))


def verify(
    model: nn.Module,
    example: Any = None,
    *,
    pattern: Selection | PatternChoice | None = None,
    allow_dense: Sequence[str] = (),
) -> Report:
    """Check that at most N of every M weights are non-zero, and return a report; raise `NotSparse` with the layers
    that are denser.

    A sparsified model is held to what `sparsify` recorded, transposable masks along both axes; while the schedule of
    its method runs, it is not sparse yet. A plain one is held to `pattern`, "2:4" or a `Selection`, on every candidate
    weight that is not excluded; without a pattern the tightest N:M of each weight is found, and a warning says that it
    was inferred.

    `example` (a tensor, a tuple of arguments or a mapping of keyword arguments) is run as well, in eval mode. Then
    every product with an operand that comes from a weight, a buffer or another constant is accounted for: sparse along
    the axis that it sums over, of a weight that was left dense when the patterns were recorded or given, or of one that
    cannot be N:M. Any other one is an error, unless it is named by `allow_dense`: globs of weights, buffers or modules;
    "*" is all. The report counts the products. Weights of unknown modules in a plain model are held to the axis that
    the example sums over, unless they are dense along it: name it with `Selection(axis=...)` to make that an error.
    docs/verify.md says what is held and what is not.

    >>> import torch
    >>> model = nn.Linear(4, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    >>> verify(model, pattern="2:4").sparse
    {'weight': Pattern(n=2, m=4)}
    """
    model = unwrap(model)
    held = _held(model, pattern, example)
    found = _found(model, held)
    broken = {name: "the weight is gone: its module was replaced" for name in held.patterns if name not in found}
    broken |= {name: each.problem for name, each in found.items() if each.problem}
    broken |= {
        name: f"{each.along_output} along the output axis"
        for name, each in found.items()
        if each.along_output and name not in broken
    }
    accounts = _accounts(model, example, held, found, allow_dense)
    if accounts:
        broken = accounts.problems | accounts.unaccounted | broken
    if broken:
        unaccounted = accounts.unaccounted.keys() if accounts else ()
        advice = [_EXCLUDE] * (pattern is not None and len(unaccounted) < len(broken)) + [_ALLOW] * bool(unaccounted)
        raise NotSparse(broken, "\n".join(advice), unaccounted)
    rows = tuple(found[name].row(name, pattern) for name, (pattern, _) in held.patterns.items()) + held.skipped
    return _report(model, rows, held, accounts)


@dataclass(frozen=True)
class _Held:
    """What a model is held to: the pattern and axis of each weight, the output axes that belong to it, what is not
    held to anything and why, and the globs of it."""

    patterns: _Recorded
    output_axes: dict[str, Axis]
    skipped: tuple[Row, ...]
    excluded: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    """What a weight is found to be: its shape, its bits, how full its groups are, and why it is denser than its
    pattern, along its own axis or along its output axis."""

    shape: tuple[int, ...]
    bits: int
    counts: GroupCounts
    problem: str
    along_output: str

    def row(self, name: str, pattern: Pattern) -> Row:
        kept, groups = self.counts.nonzero, self.counts.groups
        return Row(name, self.shape, pattern, keeps_all(pattern), kept, None, groups, self.bits)


def _found(model: nn.Module, held: _Held) -> dict[str, _Found]:
    """What each weight is that its module still has, one after the other: no two of them are in memory at once."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    found = {name: _found_of(modules, name, held) for name in held.patterns}
    return {name: each for name, each in found.items() if each is not None}


def _found_of(modules: Mapping[str, nn.Module], name: str, held: _Held) -> _Found | None:
    """What a module gives when it reads a weight, computed now; None where it is gone."""
    owner, _, tensor_name = name.rpartition(".")
    weight = getattr(modules.get(owner), tensor_name, None)
    if not isinstance(weight, Tensor):
        return None
    weight = values_of(weight.detach())
    (pattern, axis), output_axis = held.patterns[name], held.output_axes.get(name)
    counts = group_counts(weight, pattern, axis)
    along_output = too_dense(weight, pattern, output_axis) if output_axis else ""
    return _Found(tuple(weight.shape), weight.element_size() * 8, counts, counts.too_dense(pattern), along_output)


def _held(model: nn.Module, pattern: Selection | PatternChoice | None, example: Any) -> _Held:
    if not sparsity_records(model):
        return _asked(model, Selection.of(pattern), example)
    if pattern is not None:
        raise ValueError("the model is held to what sparsify recorded; pattern= is for plain models")
    if running := unfinished_weights(model):
        raise NotSparse(running)
    recorded = recorded_weights(model)
    if not recorded:
        raise ValueError(
            "the model trains with ow.Dense, or with a schedule that ends dense, and keeps every weight: there is "
            "nothing to verify"
        )
    return _Held(recorded, recorded_output_axes(model), _left_alone(model), recorded_excludes(model))


def _left_alone(model: nn.Module) -> tuple[Row, ...]:
    """The weights that sparsify left alone, and those that lie in none of the modules that it was given."""
    reasons = {weight_name(name): reason for name, reason in recorded_dense(model).items()}
    prefixes = [plain_name(name) for name, _, _ in sparsity_records(model)]
    recorded, rows = recorded_weights(model), []
    for full_name, weight in model.named_parameters():
        name = weight_name(full_name)
        outside = not any(not prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        reason = reasons.get(name) or ("in no module that sparsify was given" if outside else "")
        if reason and weight.ndim >= 2 and name not in recorded:
            rows.append(_dense_row(name, weight, reason))
    return tuple(rows)


def _accounts(
    model: nn.Module, example: Any, held: _Held, found: Mapping[str, _Found], allowed: Sequence[str]
) -> Accounts | None:
    """What the products of the example are; None without one."""
    if isinstance(allowed, str):
        raise TypeError(f"allow_dense={allowed!r} is one string; needed a list of globs, such as [{allowed!r}]")
    if example is None:
        return None
    declares = [row for row in held.skipped if row.reason != _DENSE and not row.reason.startswith(LENGTHS)]
    dense = {weight_name(row.name): row.reason for row in declares}
    declared = Declared(dense, held.excluded, tuple(allowed))
    accounts = Accounts(held.patterns, {name: each.shape for name, each in found.items()}, declared)
    watch(model, example, accounts.visit)
    return accounts


def _report(model: nn.Module, rows: tuple[Row, ...], held: _Held, accounts: Accounts | None) -> Report:
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(row.weights for row in rows)
    title = f"{plain_class(model).__name__}: every weight keeps its pattern"
    keep = counted(len(held.output_axes), "weight keeps its pattern", "weights keep their patterns")
    notes = [f"{keep} along the output axis as well"] if held.output_axes else []
    if accounts is None:
        notes += _unseen(model, held.patterns)
    else:
        title += ", and every product" if not accounts.allowed else "; not every product does"
        idle = held.patterns.keys() - accounts.reached
        notes += [f"not reached by the example: {', '.join(sorted(idle))}"] if idle else []
    return Report(rows, title, others, notes=tuple(notes), products=accounts.products if accounts else None)


def _unseen(model: nn.Module, patterns: _Recorded) -> list[str]:
    """What weights do not tell of layers whose `forward` is not one of torch: they may multiply by something else."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    owners = {name.rpartition(".")[0] for name in patterns}
    classes = [plain_class(modules[name]) for name in sorted(owners) if name in modules]
    own = Counter(
        kind.__name__ for kind in classes if not kind.forward.__module__.startswith(("torch.", "transformers."))
    )
    if not own:
        return []
    listed = ", ".join(f"{name} ({number})" for name, number in own.items())
    return [f"only an example shows what these layers multiply, whose forward is their own: {listed}"]


def decide_held(model: nn.Module, selection: Selection, example: Any) -> list[Candidate]:
    """What each weight of a plain model is held to. One whose axis only the example tells is not, where it is dense.
    Raises ValueError where none is left."""
    decided = decide(model, selection, dtypes=HELD, example=example)
    decided = [_unless_dense(each) if each.seen and each.pattern else each for each in decided]
    check_some_sparse(model, decided)
    return decided


def _unless_dense(candidate: Candidate) -> Candidate:
    assert candidate.pattern
    axes = [candidate.axis, *([candidate.output_axis] if candidate.output_axis else [])]
    if any(_denser(candidate.weight.detach(), candidate.pattern, axis) for axis in axes):
        return _left_dense(candidate)
    return candidate


def _left_dense(candidate: Candidate) -> Candidate:
    kind = type(candidate.product[0]).__name__
    reason = f"{UNKNOWN} {kind}, and dense along that of its products: name it with axis={{glob: dim}} to hold it"
    return dataclasses.replace(candidate, pattern=None, output_axis=None, reason=reason)


def _asked(model: nn.Module, selection: Selection, example: Any) -> _Held:
    """What a plain model is held to."""
    if selection.pattern is None:
        everywhere = dataclasses.replace(selection, pattern=Pattern(1, 1))
        candidates = decide_held(model, everywhere, example)
        decided = [_inferred(candidate) if candidate.pattern else candidate for candidate in candidates]
        _warn_of_inferred(decided)
    else:
        decided = decide_held(model, selection, example)
    skipped = tuple(_dense_row(each.name, each.weight, each.reason) for each in decided if not each.pattern)
    output_axes = {candidate.name: candidate.output_axis for candidate in decided if candidate.output_axis}
    patterns = {candidate.name: (candidate.pattern, candidate.axis) for candidate in decided if candidate.pattern}
    return _Held(patterns, output_axes, skipped, tuple(selection.exclude))


def _inferred(candidate: Candidate) -> Candidate:
    """The candidate with its tightest pattern, or none where that is dense."""
    pattern = tightest(candidate.weight, candidate.axis)
    if not pattern.is_dense:
        return dataclasses.replace(candidate, pattern=pattern)
    if candidate.seen:
        return _left_dense(candidate)
    return dataclasses.replace(candidate, pattern=None, reason=_DENSE)


def _warn_of_inferred(decided: list[Candidate]) -> None:
    patterns = [str(candidate.pattern) for candidate in decided if candidate.pattern]
    if not patterns:
        raise NotSparse({candidate.name: candidate.reason for candidate in decided})
    listed = ", ".join(f"{pattern} for {n}" for pattern, n in Counter(patterns).items())
    listed += " weight" if len(patterns) == 1 else " weights"
    warnings.warn(f"no pattern was given: inferred from the weights ({listed})", stacklevel=outside())


def tightest(weight: Tensor, axis: Axis) -> Pattern:
    """The pattern of lowest density that a weight satisfies, M a power of two that divides the axis; then of lowest M.

    >>> import torch
    >>> tightest(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), Axis(1))
    Pattern(n=1, m=2)
    """
    K = reduction_size(tuple(weight.shape), axis)
    fits, weight = [Pattern(1, m) for m in _GUESSES if K % m == 0], values_of(weight)
    fitting = [Pattern(max(1, group_counts(weight, guess, axis).most), guess.m) for guess in fits]
    return min(fitting, key=lambda pattern: (pattern.density, pattern.m), default=Pattern(1, 1))


def _denser(weight: Any, pattern: Pattern, axis: Axis) -> str:
    return too_dense(values_of(weight), pattern, axis)


def _dense_row(name: str, weight: Tensor, reason: str) -> Row:
    return Row(name, tuple(weight.shape), None, reason, weight.numel(), None, weight_bits=weight.element_size() * 8)
