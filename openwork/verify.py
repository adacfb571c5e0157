"""Prove that a model is as sparse as promised: its weights, and what really reaches its matrix products."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwork.axis import Axis, reduction_size
from openwork.candidates import AxisChoice, PatternChoice, decide
from openwork.gemms import Use, watch
from openwork.masks import kept_per_group
from openwork.parametrization import plain_name, unwrap
from openwork.pattern import Pattern
from openwork.report import Report, Row
from openwork.sparsify import Promise, promises

_GUESSES = tuple(2**i for i in range(1, 7))  # group sizes tried when no pattern is given


class NotSparse(ValueError):
    """Raised by `verify`. `layers`: name of each weight that is denser than promised -> what was found."""

    def __init__(self, layers: dict[str, str]):
        self.layers = layers
        listed = "\n".join(f"  {name}: {found}" for name, found in layers.items())
        super().__init__(f"{len(layers)} weights are denser than promised:\n{listed}")


def verify(
    model: nn.Module,
    example: Any = None,
    *,
    pattern: PatternChoice | None = None,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
) -> Report:
    """Check that at most N of every M weights are non-zero, and return a report; raise `NotSparse` with the layers
    that are denser.

    A sparsified model is held to what `sparsify` promised. A plain one is held to `pattern`, on every candidate weight
    that `exclude` does not name; without `pattern` the tightest N:M of each weight is found, and a warning says that
    it was inferred. `example` (a tensor, a tuple of arguments or a dict of keyword arguments) is run as well, in eval
    mode, watching every weight that reaches a matrix product or convolution.

    >>> model = nn.Linear(4, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    >>> verify(model, pattern="2:4").sparse
    {'weight': Pattern(n=2, m=4)}
    """
    model = unwrap(model)
    found = promises(model)
    if found and pattern is not None:
        raise ValueError("the model is sparsified and held to what sparsify promised; pattern= is for plain models")
    promised = _promised(found) if found else _asked(model, pattern, exclude, axis)
    weights = _readable(model, promised)
    broken = {name: "the weight is gone: its module was replaced" for name in promised if name not in weights}
    broken |= {name: problem for name, each in weights.items() if (problem := _denser(each, *promised[name]))}
    notes: tuple[str, ...] = ()
    if example is not None:
        products = _Products({name: promised[name] for name in weights}, weights)
        watch(model, example, products.visit)
        broken |= {name: problem for name, problem in products.problems.items() if name not in broken}
        unseen = sorted(weights.keys() - products.reached)
        notes = (f"not reached by the example: {', '.join(unseen)}",) if unseen else ()
    if broken:
        raise NotSparse(broken)
    rows = tuple(_row(name, weights[name].detach(), *promised[name]) for name in promised)
    return Report(rows, f"{type(model).__name__}: every promise holds", notes=notes)


def _promised(found: list[tuple[str, nn.Module, Promise]]) -> dict[str, tuple[Pattern, Axis]]:
    held = {
        f"{plain_name(prefix)}.{name}".lstrip("."): each
        for prefix, _, promise in found
        if promise.method.sparse
        for name, each in promise.weights.items()
    }
    if not held:
        raise ValueError("the model trains with ow.Dense, which promises no sparsity: there is nothing to verify")
    return held


def _asked(
    model: nn.Module, pattern: PatternChoice | None, exclude: Sequence[str], axis: AxisChoice
) -> dict[str, tuple[Pattern, Axis]]:
    decided = decide(model, pattern or Pattern(1, 1), exclude=exclude, axis=axis)
    if pattern is not None:
        return {each.name: (each.pattern, each.axis) for each in decided if each.pattern}
    tight = {each.name: (tightest(each.weight, each.axis), each.axis) for each in decided if each.pattern}
    sparse = {name: each for name, each in tight.items() if each[0].n < each[0].m}
    if not sparse:
        raise NotSparse({name: "no N:M pattern with N < M holds" for name in tight})
    listed = ", ".join(f"{pattern} for {n}" for pattern, n in Counter(str(each) for each, _ in sparse.values()).items())
    warnings.warn(f"no pattern was given: inferred from the weights ({listed} weights)", stacklevel=3)
    return sparse


def tightest(weight: Tensor, axis: Axis) -> Pattern:
    """The pattern of lowest density that a weight satisfies, M a power of two that divides the axis; then of lowest M.

    >>> tightest(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), Axis(1))
    Pattern(n=1, m=2)
    """
    K = reduction_size(tuple(weight.shape), axis)
    fits = [Pattern(1, m) for m in _GUESSES if K % m == 0]
    found = [Pattern(max(1, int(kept_per_group(weight, each, axis).max())), each.m) for each in fits]
    return min(found, key=lambda each: (each.density, each.m), default=Pattern(1, 1))


def _denser(weight: Tensor, pattern: Pattern, axis: Axis) -> str:
    """What is wrong with a weight, or nothing."""
    kept = kept_per_group(weight.detach(), pattern, axis)
    wrong = int((kept > pattern.n).sum())
    if not wrong:
        return ""
    worst = int(kept.max())
    return f"{wrong} of {kept.numel()} groups hold more than {pattern.n} of {pattern.m} (the worst {worst})"


def _readable(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What a module gives when it reads each weight, computed now."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    found = {}
    for name in names:
        owner, _, tensor = name.rpartition(".")
        weight = getattr(modules.get(owner), tensor, None)
        if isinstance(weight, Tensor):
            found[name] = weight
    return found


class _Products:
    """Compares what reaches the products with what was promised."""

    def __init__(self, promised: dict[str, tuple[Pattern, Axis]], weights: dict[str, Tensor]):
        self.promised, self.weights = promised, weights
        self.problems: dict[str, str] = {}
        self.reached: set[str] = set()

    def visit(self, use: Use) -> None:
        for name in use.names & self.promised.keys():
            if use.whole and name in self.reached:
                continue
            self.reached.add(name)
            self._hold(name, self._found(use.operand, name), "")
        if not use.names:
            self._visit_unknown(use)

    def _visit_unknown(self, use: Use) -> None:
        """A weight that no parameter gave: hold it to the promises of its shape in the module that runs."""
        around = f"{use.inside}." if use.inside else ""
        for name in self.promised:
            if name.startswith(around) and sorted(use.operand.shape) == sorted(self.weights[name].shape):
                self._hold(name, self._found(use.operand, name), " in a tensor that is none of the model's parameters")

    def _hold(self, name: str, problems: list[str], where: str) -> None:
        if problems and all(problems):
            self.problems[name] = f"reached a matrix product{where} with {problems[0]}"

    def _found(self, operand: Tensor, name: str) -> list[str]:
        """What is wrong with the operand as it lies, for each way it may lie; none if it has another shape."""
        pattern, axis = self.promised[name]
        shape = self.weights[name].shape
        if operand.shape == shape and (operand.ndim != 2 or shape[0] != shape[1]):
            return [_denser(operand, pattern, axis)]
        if operand.ndim != 2 or len(shape) != 2 or axis.flat:
            return []
        return [_denser(operand, pattern, Axis(dim)) for dim in (0, 1) if operand.shape[dim] == shape[axis.dim]]


def _row(name: str, weight: Tensor, pattern: Pattern, axis: Axis) -> Row:
    groups = kept_per_group(weight, pattern, axis).numel()
    kept = int((weight != 0).sum())
    return Row(name, tuple(weight.shape), pattern, "", kept, 1.0, groups, weight.element_size() * 8)
