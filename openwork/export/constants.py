"""What is constant in an ONNX graph, what data only scales, and the numbers of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_OWN = ("", "ai.onnx", "com.microsoft")  # ONNX Runtime has operators of the same names for more types
_MOVES = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Expand", "Slice")
_ELEMENTWISE = ("Mul", "Div", "Add", "Sub", "Pow", "Where", "Max", "Min", "Neg", "Sqrt", "Reciprocal", "Abs")
_KEEPS_ZEROS = ("Identity", "Cast")


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant by the name of the largest that it is computed from; `array` is None where it cannot be computed
    here. `scaled`: data has a part in it, but only as a factor of it."""

    name: str
    array: np.ndarray[Any, Any] | None
    scaled: bool = False


class Constants:
    """Finds constants of one graph: initializers, and what ONNX's reference implementation computes of them."""

    def __init__(self) -> None:
        self._known: dict[Any, Constant | None] = {}

    def of(self, value: Any) -> Constant | None:
        """What a value is; None where it is data."""
        if value is None:
            return None
        for each in _with_ancestors(value, self._known):  # the deepest first: graphs are deeper than Python's stack
            self._known[each] = self._found(each)
        return self._known[value]

    def _found(self, value: Any) -> Constant | None:
        if value.const_value is not None:
            return Constant(value.name, value.const_value.numpy())
        node = value.producer()
        if node is None or not node.outputs:
            return None
        if node.op_type == "Constant":
            return Constant(value.name, _evaluated(node, [], value))
        inputs = [self._known[each] for each in node.inputs if each is not None]
        constants = [each for each in inputs if each is not None]
        if not constants or any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()):
            return None
        largest = max(constants, key=lambda each: 0 if each.array is None else each.array.size)
        if any(each.scaled for each in constants) or len(constants) < len(inputs):
            return self._scaled(node, constants)
        if node.op_type in _KEEPS_ZEROS:
            return Constant(largest.name, largest.array)
        return Constant(largest.name, self._computed(node, value))

    def _computed(self, node: Any, value: Any) -> np.ndarray[Any, Any] | None:
        arrays = [None if each is None else self._known[each].array for each in node.inputs]  # type: ignore[union-attr]
        if any(array is None and each is not None for array, each in zip(arrays, node.inputs, strict=True)):
            return None
        return _evaluated(node, arrays, value)

    def _scaled(self, node: Any, constants: Sequence[Constant]) -> Constant | None:
        """A weight that data scales: with its numbers, whose zeros it keeps; without where data is added."""
        if node.op_type in _MOVES:
            moved = self._known[node.inputs[0]]
            if moved is None or not moved.scaled:
                return None
            return Constant(moved.name, self._computed(node, node.outputs[0]), scaled=True)
        if node.op_type not in _ELEMENTWISE:
            return None
        data = [each for each in node.inputs if each is not None and self._known[each] is None]
        for each in node.inputs:
            constant = None if each is None else self._known[each]
            if constant is not None and (constant.scaled or is_matrix(constant)) and not _covered(each, constant, data):
                factors = node.op_type == "Mul" or (node.op_type == "Div" and each is node.inputs[0])
                return Constant(constant.name, constant.array if factors else None, scaled=True)
        return None


def is_matrix(constant: Constant) -> bool:
    """Whether a constant may be a weight: it has two dims or more that are longer than 1, and a number but 0."""
    array = constant.array
    return array is None or (sum(length > 1 for length in array.shape) > 1 and bool((array != 0).any()))


def _covered(value: Any, constant: Constant, data: Sequence[Any]) -> bool:
    """Whether data differs at all places of a constant, as activations do from a table of positions."""
    shape = _dims(value) if constant.array is None else [length > 1 for length in constant.array.shape]
    varying = [i for i, varies in enumerate(reversed(shape or [])) if varies]
    if shape is None:
        return False
    lengths = [_dims(each) for each in data]
    return any(each is not None and all(i < len(each) and list(reversed(each))[i] for i in varying) for each in lengths)


def _dims(value: Any) -> list[bool] | None:
    """Which dims of a value are longer than 1, as far as the file says; None where it says nothing."""
    return None if value.shape is None else [not isinstance(dim, int) or dim > 1 for dim in value.shape]


def _with_ancestors(value: Any, known: dict[Any, Constant | None]) -> list[Any]:
    """The value and everything it is computed from that is not known yet, in the order of the graph."""
    order: dict[Any, None] = {}
    stack = [(value, False)]
    while stack:
        each, is_done = stack.pop()
        if is_done:
            order[each] = None
        elif each not in known and each not in order:
            stack.append((each, True))
            node = None if each.const_value is not None else each.producer()
            stack += [(before, False) for before in (node.inputs if node else ()) if before is not None]
    return list(order)


def _evaluated(node: Any, arrays: Sequence[Any], value: Any) -> np.ndarray[Any, Any] | None:
    """What ONNX's reference implementation computes; None where it cannot."""
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    if node.domain not in _OWN:
        return None
    proto = onnx_ir.to_proto(node)
    proto.domain = ""
    feeds = {name: array for name, array in zip(proto.input, arrays, strict=True) if name}
    try:
        results: Any = ReferenceEvaluator(proto).run([value.name], feeds)
    except Exception:  # each operator of it has its own
        return None
    return results[0] if isinstance(results[0], np.ndarray) else None
