"""Hold every product of a constant to what was recorded: sparse along its own sum, declared dense, or not accounted
for."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cpu.counts import too_dense
from openwork.nm.groups import Axis, reduction_size, to_rows
from openwork.nm.pattern import Pattern
from openwork.training.dtensor import full_tensor
from openwork.training.matmul_trace import Multiplied, Operand, storage_key
from openwork.training.report import Products, keeps_all
from openwork.training.selection import matches
from openwork.utils.counted import counted

Recorded = Mapping[str, tuple[Pattern, Axis]]
_LAST = Axis(-1)


@dataclass(frozen=True)
class Declared:
    """What may be dense: weights by name with the reason; globs that were excluded, for buffers too; and globs of
    `allowed` products."""

    dense: Mapping[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def reason(self, names: Iterable[str]) -> str:
        """Why a product of these may be dense; empty where nothing says so."""
        for name in names:
            if name in self.dense:
                return self.dense[name]
            glob = next((glob for glob in self.excluded if matches(glob, name)), None)
            if glob is not None:
                return f"excluded by {glob!r}"
        return ""

    def allows(self, names: Iterable[str]) -> bool:
        return any(matches(glob, name) for glob in self.allowed for name in names)


class Accounts:
    """What the products of one forward pass are. `problems`: those of recorded weights, by name; `unaccounted`: dense
    products that nothing declares, by what is multiplied; `left_dense`, `allowed`: those that may be; `reached`
    and `sparse_names`: the recorded weights that were multiplied, and that were so as they are recorded; `sparse` and
    `dense` count products."""

    def __init__(self, recorded: Recorded, shapes: Mapping[str, tuple[int, ...]], declared: Declared):
        self.recorded = {name: recorded[name] for name in shapes}
        self.shapes, self.declared = shapes, declared
        self.problems: dict[str, str] = {}
        self.unaccounted: dict[str, str] = {}
        self.allowed: dict[str, str] = {}
        self.left_dense: dict[str, str] = {}
        self.sparse = self.dense = 0
        self.sparse_names: set[str] = set()
        self.reached: set[str] = set()
        self._known: dict[Hashable, str] = {}

    def visit(self, product: Multiplied) -> None:
        """Account for one product. It is sparse where one operand is, and where it only makes one constant of others
        it is judged when that is multiplied with data."""
        operands = [each for each in product.operands if each.tensor is None or _is_summed(each)]
        if not operands:
            return
        found = [self._problem(each, product) for each in operands]
        self.reached |= {name for operand in operands for name in operand.names & self.recorded.keys()}
        for operand, problem in zip(operands, found, strict=True):
            self.sparse_names |= set() if problem else operand.names & self.recorded.keys()
        if not product.with_data:
            return
        kept = [self._kept_whole(operand, product) for operand in operands]
        if not all(problem or reason for problem, reason in zip(found, kept, strict=True)):
            self.sparse += 1
            return
        self.dense += 1
        for operand, problem, reason in zip(operands, found, kept, strict=True):
            if reason:
                self.left_dense[_label(operand, product)] = reason
            elif not any(kept):
                self._note(operand, problem, product)

    @property
    def products(self) -> Products:
        return Products(self.sparse, self.dense, self.left_dense, self.allowed)

    def _problem(self, operand: Operand, product: Multiplied) -> str:
        """Why an operand is not N:M along its sum; empty where it is."""
        tensor = operand.tensor
        if tensor is None:
            return f"operator {product.operator} is not one that verify can follow"
        names = operand.names & self.recorded.keys() or self._alike(operand, product.inside)
        key = (_identity(tensor), operand.axes, frozenset(names))
        if key[0] is None or key not in self._known:
            self._known[key] = self._why_dense(tensor, operand.axes, names)
        return self._known[key]

    def _why_dense(self, tensor: Tensor, axes: tuple[Axis, ...], names: Collection[str]) -> str:
        """An operand of recorded weights is held to their patterns, any other one to those that divide its axis."""
        K = reduction_size(tuple(tensor.shape), axes[0])
        placed = {self.recorded[name]: self.shapes[name] for name in names}
        if not names:
            patterns = {each for each, _ in self.recorded.values() if K % each.m == 0 and not each.is_dense}
            placed = {(pattern, axes[0]): () for pattern in patterns}
        problem, mask = f"its reduction axis has {counted(K, 'weight')}", mask_of(tensor)
        for (pattern, axis), shape in sorted(placed.items(), key=lambda each: -each[0][0].density):
            problem = why_dense(mask, pattern, axes, axis, shape)
            if not problem:
                return ""
        return problem

    def _kept_whole(self, operand: Operand, product: Multiplied) -> str:
        """Why an operand is dense though it is as recorded: its patterns prune nothing. Empty where one does."""
        names = operand.names & self.recorded.keys() or self._alike(operand, product.inside)
        patterns = sorted({self.recorded[name][0] for name in names})
        return keeps_all(patterns[0]) if all(pattern.is_dense for pattern in patterns) and patterns else ""

    def _alike(self, operand: Operand, inside: str) -> frozenset[str]:
        """The recorded weights that a tensor which is none of the model's may be a copy of: those of its shape in the
        module that runs."""
        if operand.names or operand.tensor is None:
            return frozenset()
        around, shape = f"{inside}." if inside else "", sorted(operand.tensor.shape)
        return frozenset(
            name for name in self.recorded if name.startswith(around) and sorted(self.shapes[name]) == shape
        )

    def _note(self, operand: Operand, problem: str, product: Multiplied) -> None:
        """Enter a dense operand where it belongs."""
        recorded, names = operand.names & self.recorded.keys(), operand.names
        named, label = _named(operand, product), _label(operand, product)
        alike = self._alike(operand, product.inside)
        if self.declared.allows(named):
            self.allowed[label] = problem
        elif recorded or alike:
            where = f" in a tensor that is none of the model's parameters ({label!r} in allow_dense)" if alike else ""
            for name in recorded | alike:
                self.problems[name] = f"multiplied{where} while {problem}{_together(names - {name})}"
        elif reason := self.declared.reason(named) or self._undivided(operand):
            self.left_dense[label] = reason
        else:
            what = f"{tuple(operand.tensor.shape)} " if operand.tensor is not None else ""
            self.unaccounted[label] = (
                f"{what}multiplied in {product.inside or 'the model'} ({product.operator}): {problem}"
            )

    def _undivided(self, operand: Operand) -> str:
        """Why a constant cannot be N:M; empty where it can."""
        if operand.tensor is None:
            return ""
        length = reduction_size(tuple(operand.tensor.shape), operand.axes[0])
        ms = sorted({pattern.m for pattern, _ in self.recorded.values() if not pattern.is_dense})
        if any(length % m == 0 for m in ms):
            return ""
        if not ms:
            return "no weight is sparse"
        return f"reduction axis has {counted(length, 'weight')}, not a multiple of {' or '.join(map(str, ms))}"


def _named(operand: Operand, product: Multiplied) -> list[str]:
    return sorted(operand.names) or [f"{product.inside}.constant" if product.inside else "constant"]


def _label(operand: Operand, product: Multiplied) -> str:
    return " and ".join(_named(operand, product))


def mask_of(weight: Any) -> Tensor:
    """Which weights are not zero, of a tensor that is spread over processes, quantized, or of another layout."""
    return values_of(weight) != 0


def values_of(weight: Any) -> Tensor:
    """The numbers of a weight that is spread over processes, quantized, or of another layout. Zeros stay zeros."""
    if type(weight).__module__.startswith("torchao.") or weight.is_quantized:
        return weight.dequantize()
    weight = full_tensor(weight)
    return weight.to_dense() if weight.is_mkldnn or weight.is_sparse or weight.is_sparse_csr else weight


def why_dense(mask: Tensor, pattern: Pattern, axes: Sequence[Axis], recorded: Axis, shape: tuple[int, ...] = ()) -> str:
    """Why a constant is not N:M along any of the axes that a product sums over; empty where it is.

    Groups of M weights lie side by side, or as far apart as they do in the flattened weight of `shape` that was
    `recorded`, or begin at another place than the first where the constant is a part of that weight.
    """
    if recorded.flat and tuple(mask.shape) == tuple(shape):
        return too_dense(mask, pattern, recorded)
    long = [axis for i, axis in enumerate(axes) if not i or reduction_size(tuple(mask.shape), axis) >= pattern.m]
    problems = [too_dense(mask, pattern, axis) for axis in long]
    if not all(problems):
        return ""
    whole = reduction_size(tuple(shape), recorded) if shape else 0
    step = _size(shape[recorded.dim + 1 :])
    for axis in long:
        rows = to_rows(mask, axis)
        K = rows.shape[-1]
        other = [rows.unflatten(-1, (-1, step)).movedim(-1, -2)] if K % step == 0 and 1 < step < K else []
        if whole != K:
            firsts = range(1, min(pattern.m, K - pattern.m + 1))
            other += [rows[..., first:] for first in firsts if _fits(rows[..., :first], pattern)]
        if any(not too_dense(each, pattern, _LAST) for each in other):
            return ""
    return problems[0]


def _fits(rows: Tensor, pattern: Pattern) -> bool:
    return int(rows.sum(-1).max()) <= pattern.n


def _is_summed(operand: Operand) -> bool:
    """Whether more than one number goes into each sum, unlike in an outer product."""
    assert operand.tensor is not None
    return any(reduction_size(tuple(operand.tensor.shape), axis) > 1 for axis in operand.axes)


def _together(names: frozenset[str]) -> str:
    return f" (computed from it and {', '.join(sorted(names))})" if names else ""


def _identity(tensor: Tensor) -> Hashable:
    """Equal for the same numbers; None where that cannot be told."""
    if tensor.layout != torch.strided or tensor.is_mkldnn or tensor.is_inference():
        return None
    return storage_key(tensor), tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _size(lengths: Iterable[int]) -> int:
    size = 1
    for length in lengths:
        size *= length
    return size
