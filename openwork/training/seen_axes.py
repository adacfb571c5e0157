"""Which dim of a weight the products of an example sum over, where its module does not tell.

A product is given a view of the weight or a copy: one expert of many, transposed, in another dtype, expanded, gathered
by the router. What a copy's dims are is noted when it is made; which of them a view runs along, its strides say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwork.nm.groups import Axis, reduction_size
from openwork.training.matmul_trace import Multiplied, Operand, storage_key, watch
from openwork.training.operands import is_product, name_of
from openwork.training.traces import LOOKUPS, Traced

Dims = tuple[tuple[int, ...], ...]
"""For each dim of a tensor the dims of the weight that it runs along, innermost first; none where it repeats."""

_SAME_ORDER = {"cat", "constant_pad_nd", "gather", "index_select", "repeat", "repeat_interleave"}  # lengths may differ


def seen_axes(model: nn.Module, example: Any, weights: Mapping[str, Tensor]) -> dict[str, Axis | str]:
    """For each of the `weights`, by name, the axis that its products with data sum over, or the reason why there is
    none. Runs `model` once on `example`, in eval mode.

    Of several dims that one product sums over together, as of a convolution's flattened weight, it is the longest, and
    of equal ones the innermost. Experts share a weight: it is seen as soon as one of them got a token.
    """
    seen = _Seen(weights)
    watch(model, example, seen.visit, names={id(weight): name for name, weight in weights.items()}, follow=seen.follow)
    return {name: seen.result(name) for name in weights}


@dataclass(frozen=True)
class _Layout:
    """Where a tensor lies in its memory, and which dims of the weight its own are."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dims: Dims

    @classmethod
    def of(cls, tensor: Tensor, dims: Dims) -> _Layout:
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), dims)

    def dims_of(self, view: Tensor) -> Dims | None:
        """What the dims of a view of this memory are; None of one that lies outside of the tensor."""
        end = self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        if not self.offset <= view.storage_offset() <= end:
            return None
        return tuple(self._along(size, step) for size, step in zip(view.shape, view.stride(), strict=True))

    def _along(self, size: int, step: int) -> tuple[int, ...]:
        """The dims of the weight that `size` numbers, each `step` after the last, run along."""
        last = (size - 1) * step
        found: list[int] = []
        for stride, length, dims in sorted(zip(self.strides, self.sizes, self.dims, strict=True)):
            if 0 < step < stride * length and stride <= last and length > 1:
                found += dims
        return tuple(found)


class _Seen:
    """What became of the weights so far: where copies of each lie, and the axes of their products."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.layouts: dict[Hashable, dict[str, _Layout]] = defaultdict(dict)
        self.axes: dict[str, set[Axis]] = defaultdict(set)
        self.unclear: dict[str, str] = {}
        self.idle: dict[str, str] = {}
        for name, weight in weights.items():
            own = tuple((dim,) for dim in range(weight.ndim))
            self.layouts[storage_key(weight)][name] = _Layout.of(weight, own)

    def follow(self, func: Any, args: Any, operands: Traced, result: Tensor) -> None:
        """Note what the dims of a tensor are that an operator has made of the weights."""
        operator = name_of(func)
        readable = result.layout == torch.strided and not result.is_mkldnn
        for tensor, trace in operands:
            for name in trace.names & self.shapes.keys():
                if operator in LOOKUPS and trace.constant and tensor is operands[0][0]:
                    self.idle.setdefault(name, "its rows are looked up and not multiplied in the example")
                dims = self._dims(name, tensor) if readable and not is_product(func) else None
                made = _made(operator, args, tensor, dims, result) if dims else None
                if made:
                    self.layouts[storage_key(result)].setdefault(name, _Layout.of(result, made))

    def visit(self, product: Multiplied) -> None:
        """Note along which axis each weight in a product is summed."""
        for operand in product.operands:
            for name in operand.names & self.shapes.keys():
                if not product.with_data:
                    self.idle[name] = "it is multiplied with other weights only"
                elif operand.tensor is None:
                    self.unclear[name] = f"operator {product.operator} does not tell what it sums over"
                elif reduction_size(tuple(operand.tensor.shape), operand.axes[0]) < 2:
                    self.idle[name] = "its products sum over one of its numbers each"
                elif axis := self._axis(name, operand):
                    self.axes[name].add(axis)
                else:
                    self.unclear[name] = f"what {product.operator} multiplies is computed of it, and no copy"

    def result(self, name: str) -> Axis | str:
        """The one axis of a weight, or why it has none."""
        if name in self.unclear:
            return self.unclear[name]
        axes = sorted(self.axes[name], key=lambda axis: (axis.dim, axis.blocks))
        if len(axes) == 1:
            return axes[0]
        if axes:
            return f"its products sum over different dims, {' and '.join(str(axis.dim) for axis in axes)}"
        return self.idle.get(name, "it is not multiplied in the example")

    def _dims(self, name: str, tensor: Tensor) -> Dims | None:
        layout = self.layouts.get(storage_key(tensor), {}).get(name)
        return layout.dims_of(tensor) if layout else None

    def _axis(self, name: str, operand: Operand) -> Axis | None:
        assert operand.tensor is not None
        dims, axis, shape = self._dims(name, operand.tensor), operand.axes[0], self.shapes[name]
        along = dims[axis.dim] if dims else ()
        if not along or (axis.blocks > 1 and shape[along[0]] != operand.tensor.shape[axis.dim]):
            return None
        return Axis(max(along, key=lambda dim: shape[dim]), axis.blocks)


def _made(operator: str, args: Any, tensor: Tensor, dims: Dims, result: Tensor) -> Dims | None:
    """What the dims of a result are, of an operator that computes each of its numbers of one number of `tensor`, or
    copies them to other places; None of any other operator."""
    if operator == "index":
        return _indexed(args[1], dims, result)
    if operator == "stack":
        place = (args[1] if len(args) > 1 else 0) % result.ndim
        return (*dims[:place], (), *dims[place:])
    new = result.ndim - len(dims)
    fits = new >= 0 and all(size in (1, length) for size, length in zip(tensor.shape, result.shape[new:], strict=True))
    return ((),) * new + dims if fits or (new == 0 and operator in _SAME_ORDER) else None


def _indexed(indices: Any, dims: Dims, result: Tensor) -> Dims | None:
    """The dims that are left by `tensor[indices]`, where neighbouring ones are replaced."""
    places = [place for place, index in enumerate(indices) if index is not None]
    if places != list(range(places[0], places[-1] + 1)) or any(not index.dtype.is_signed for index in _given(indices)):
        return None
    new = max(index.ndim for index in _given(indices))
    left = (*dims[: places[0]], *((),) * new, *dims[places[-1] + 1 :])
    return left if len(left) == result.ndim else None


def _given(indices: Any) -> list[Tensor]:
    return [index for index in indices if index is not None]
