"""Prove that a model is as sparse as its patterns say: its weights, and what really reaches its matmuls."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from openwork.nm.groups import Axis, reduction_size
from openwork.nm.masks import kept_per_group, too_dense
from openwork.nm.pattern import Pattern
from openwork.training.dtensor import full_tensor
from openwork.training.matmul_trace import Operand, watch
from openwork.training.parametrize import plain_name, unwrap
from openwork.training.record import recorded_output_axes, recorded_weights, sparsity_records, unfinished_weights
from openwork.training.report import Report, Row
from openwork.training.select import HELD, Candidate, decide
from openwork.training.selection import PatternChoice, Selection
from openwork.training.shared_class import plain_class

_GUESSES = tuple(2**i for i in range(1, 7))  # group sizes tried when no pattern is given
_Recorded = dict[str, tuple[Pattern, Axis]]
_EXCLUDE = "layers that are to stay dense are left out by pattern=ow.Selection('2:4', exclude=[...])"


class NotSparse(ValueError):
    """Raised by `verify`. `layers`: name of each weight that is denser than its pattern -> what was found. `advice`
    says what to do."""

    def __init__(self, layers: dict[str, str], advice: str = ""):
        self.layers = layers
        listed = [f"  {name}: {problem}" for name, problem in layers.items()]
        what = f"{len(layers)} weights are denser than their pattern:"
        super().__init__("\n".join([what, *listed, *([advice] if advice else [])]))


def verify(
    model: nn.Module,
    example: Any = None,
    *,
    pattern: Selection | PatternChoice | None = None,
) -> Report:
    """Check that at most N of every M weights are non-zero, and return a report; raise `NotSparse` with the layers
    that are denser.

    A sparsified model is held to what `sparsify` recorded, transposable masks along both axes; while the schedule of
    its method runs, it is not sparse yet. A plain one is held to `pattern`, "2:4" or a `Selection`, on every candidate
    weight that is not excluded; without a pattern the tightest N:M of each weight is found, and a warning says that it
    was inferred. `example` (a tensor, a tuple of arguments or a mapping of keyword arguments) is run as well, in eval
    mode, watching every weight that reaches a matmul or a convolution.

    >>> import torch
    >>> model = nn.Linear(4, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    >>> verify(model, pattern="2:4").sparse
    {'weight': Pattern(n=2, m=4)}
    """
    model = unwrap(model)
    sparsified = bool(sparsity_records(model))
    if sparsified and pattern is not None:
        raise ValueError("the model is held to what sparsify recorded; pattern= is for plain models")
    skipped: tuple[Row, ...] = ()
    if sparsified:
        if running := unfinished_weights(model):
            raise NotSparse(running)
        recorded, output_axes = _recorded(model), recorded_output_axes(model)
    else:
        recorded, output_axes, skipped = _asked(model, Selection.of(pattern))
    weights = _readable(model, recorded)
    broken = {name: "the weight is gone: its module was replaced" for name in recorded if name not in weights}
    broken |= {name: problem for name, weight in weights.items() if (problem := _denser(weight, *recorded[name]))}
    broken |= {
        name: f"{problem} along the output axis"
        for name, axis in output_axes.items()
        if name in weights and name not in broken and (problem := _denser(weights[name], recorded[name][0], axis))
    }
    operands = _Operands(recorded, weights)
    if example is not None:
        watch(model, example, operands.visit)
        broken = operands.problems | broken
    if broken:
        raise NotSparse(broken, _EXCLUDE if pattern is not None else "")
    rows = tuple(_row(name, weights[name], *recorded[name]) for name in recorded)
    rows += skipped
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(row.weights for row in rows)
    title = f"{plain_class(model).__name__}: every weight keeps its pattern"
    notes = (f"{len(output_axes)} weights are so along the output axis as well",) if output_axes else ()
    return Report(rows, title, others, notes=notes + (operands.notes() if example is not None else ()))


def _recorded(model: nn.Module) -> _Recorded:
    recorded = recorded_weights(model)
    if not recorded:
        raise ValueError("the model trains with ow.Dense, which keeps every weight: there is nothing to verify")
    return recorded


def _asked(model: nn.Module, selection: Selection) -> tuple[_Recorded, dict[str, Axis], tuple[Row, ...]]:
    """What a plain model is held to, the output axes that belong to it, and what is not held to anything, and why."""
    if selection.pattern is None:
        everywhere = dataclasses.replace(selection, pattern=Pattern(1, 1))
        candidates = decide(model, everywhere, dtypes=HELD)
        decided = [_inferred(candidate) if candidate.pattern else candidate for candidate in candidates]
        _warn_of_inferred(decided)
    else:
        decided = decide(model, selection, dtypes=HELD)
    skipped = tuple(_skipped(candidate) for candidate in decided if not candidate.pattern)
    output_axes = {candidate.name: candidate.output_axis for candidate in decided if candidate.output_axis}
    patterns = {candidate.name: (candidate.pattern, candidate.axis) for candidate in decided if candidate.pattern}
    return patterns, output_axes, skipped


def _inferred(candidate: Candidate) -> Candidate:
    """The candidate with its tightest pattern, or none where that is dense."""
    pattern = tightest(candidate.weight, candidate.axis)
    if pattern.n < pattern.m:
        return dataclasses.replace(candidate, pattern=pattern)
    return dataclasses.replace(candidate, pattern=None, reason="no N:M pattern with N < M holds")


def _warn_of_inferred(decided: list[Candidate]) -> None:
    patterns = [str(candidate.pattern) for candidate in decided if candidate.pattern]
    if not patterns:
        raise NotSparse({candidate.name: candidate.reason for candidate in decided})
    listed = ", ".join(f"{pattern} for {n}" for pattern, n in Counter(patterns).items())
    warnings.warn(f"no pattern was given: inferred from the weights ({listed} weights)", stacklevel=4)


def tightest(weight: Tensor, axis: Axis) -> Pattern:
    """The pattern of lowest density that a weight satisfies, M a power of two that divides the axis; then of lowest M.

    >>> import torch
    >>> tightest(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), Axis(1))
    Pattern(n=1, m=2)
    """
    K = reduction_size(tuple(weight.shape), axis)
    fits, weight = [Pattern(1, m) for m in _GUESSES if K % m == 0], _values(weight)
    fitting = [Pattern(max(1, int(kept_per_group(weight, guess, axis).max())), guess.m) for guess in fits]
    return min(fitting, key=lambda pattern: (pattern.density, pattern.m), default=Pattern(1, 1))


def _denser(weight: Any, pattern: Pattern, axis: Axis) -> str:
    return too_dense(_values(weight), pattern, axis)


def _values(weight: Any) -> Tensor:
    """The numbers of a weight that is spread over processes, or quantized by torchao. Zeros stay zeros in int8."""
    return weight.dequantize() if type(weight).__module__.startswith("torchao.") else full_tensor(weight)


def _readable(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What a module gives when it reads each weight, computed now."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    readable = {}
    for name in names:
        owner, _, tensor_name = name.rpartition(".")
        weight = getattr(modules.get(owner), tensor_name, None)
        if isinstance(weight, Tensor):
            readable[name] = weight.detach()
    return readable


class _Operands:
    """Compares what reaches the matmuls with what was recorded."""

    def __init__(self, recorded: _Recorded, weights: dict[str, Tensor]):
        self.recorded = {name: recorded[name] for name in weights}
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.problems: dict[str, str] = {}
        self.reached: set[str] = set()
        self.misshapen: set[str] = set()

    def visit(self, operand: Operand) -> None:
        """Hold an operand to what was recorded of the parameters it comes from. One that comes from none is held to
        those of its shape in the module that runs."""
        if not operand.names:
            self._visit_unknown(operand)
        for name in operand.names & self.recorded.keys():
            self.reached.add(name)
            axes = self._possible_axes(operand.tensor, name)
            if not axes:
                self.misshapen.add(name)
            self._hold(name, operand.tensor, axes, "")

    def notes(self) -> tuple[str, ...]:
        lists = {
            "not reached by the example": self.recorded.keys() - self.reached,
            "multiplied in another shape, which was not checked": self.misshapen,
        }
        return tuple(f"{what}: {', '.join(sorted(names))}" for what, names in lists.items() if names)

    def _visit_unknown(self, operand: Operand) -> None:
        around = f"{operand.inside}." if operand.inside else ""
        for name in self.recorded:
            if name.startswith(around) and sorted(operand.tensor.shape) == sorted(self.shapes[name]):
                where = " in a tensor that is none of the model's parameters"
                self._hold(name, operand.tensor, self._possible_axes(operand.tensor, name), where)

    def _hold(self, name: str, operand: Tensor, axes: list[Axis], where: str) -> None:
        problems = [_denser(operand, self.recorded[name][0], axis) for axis in axes]
        if problems and all(problems):
            self.problems[name] = f"multiplied{where} while {problems[0]}"

    def _possible_axes(self, operand: Tensor, name: str) -> list[Axis]:
        """The axes that may be the reduction axis, in an operand that may be transposed, cut or joined."""
        axis, shape = self.recorded[name][1], self.shapes[name]
        if operand.shape == shape and (axis.flat or operand.ndim > 3):  # kernels of a convolution lie one way only
            return [axis]
        if axis.flat:
            return []
        return [Axis(dim, axis.blocks) for dim, length in enumerate(operand.shape) if length == shape[axis.dim]]


def _row(name: str, weight: Tensor, pattern: Pattern, axis: Axis) -> Row:
    weight = _values(weight)
    groups = kept_per_group(weight, pattern, axis).numel()
    kept = int((weight != 0).sum())
    return Row(name, tuple(weight.shape), pattern, "", kept, None, groups, weight.element_size() * 8)


def _skipped(candidate: Candidate) -> Row:
    weight = candidate.weight
    bits = weight.element_size() * 8
    return Row(candidate.name, tuple(weight.shape), None, candidate.reason, weight.numel(), None, weight_bits=bits)
