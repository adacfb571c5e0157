"""Which inputs of an ONNX operator are multiplied, along which axis each is summed, and what stands for zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openwork.nm.groups import Axis

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """One input that is multiplied. `axis` gives the axis that is summed over, by the input's number of dims; `zero` is
    the input that holds its zero point, one number or one for each index of dim `channel`."""

    index: int
    axis: Callable[[int], Axis]
    zero: int | None = None
    channel: int = -1


def places(node: Any) -> list[Place]:
    """The inputs of a node that are multiplied; none where it multiplies none, or is not in the table."""
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return []
    find = _TABLE.get(node.op_type)
    return [] if find is None or (node.op_type == "Attention" and node.domain != "com.microsoft") else find(node)


def is_harmless(node: Any) -> bool:
    """Whether an operator adds, moves, looks up or scales one by one what it is given, and sums no products."""
    known = _HARMLESS if node.domain in ("", "ai.onnx", "com.microsoft") else {("openwork", "AddLayerNormalization")}
    return node.op_type in known or (node.domain, node.op_type) in known


def zeros_of(array: Array, zero: Array | None, place: Place) -> Array:
    """Which numbers of a constant are not zero, its zero point taken off."""
    if zero is None or zero.size == 1:
        return np.asarray(array != (0 if zero is None else zero.reshape(())))
    if zero.ndim > 1:  # (directions, gates) of a recurrent layer
        return np.asarray(array != np.expand_dims(zero, 1))
    shape = [1] * array.ndim
    shape[place.channel] = zero.size
    return np.asarray(array != zero.reshape(shape))


def _number(node: Any, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _gemm(a: int, b: int, a_zero: int | None = None, b_zero: int | None = None) -> Callable[[Any], list[Place]]:
    def find(node: Any) -> list[Place]:
        left, right = 1 - _number(node, "transA"), _number(node, "transB")
        return [
            Place(a, lambda _: Axis(left), a_zero, channel=1 - left),
            Place(b, lambda _: Axis(right), b_zero, channel=1 - right),
        ]

    return find


def _matmul(a: int, b: int, a_zero: int | None = None, b_zero: int | None = None) -> Callable[[Any], list[Place]]:
    def find(node: Any) -> list[Place]:
        left, right = 1 + _number(node, "transA"), 2 - _number(node, "transB")  # counted from behind
        return [
            Place(a, lambda ndim: Axis(ndim - left), a_zero, channel=left - 3),
            Place(b, lambda ndim: Axis(max(ndim - right, 0)), b_zero, channel=right - 3),
        ]

    return find


def _at(*of: tuple[int, int, int | None]) -> Callable[[Any], list[Place]]:
    """Fixed (input, axis, zero point); a zero point for each index of dim 0, or of the last where the axis is 0."""

    def find(_: Any) -> list[Place]:
        return [Place(index, _fixed(axis), zero, 0 if axis else -1) for index, axis, zero in of]

    return find


def _fixed(dim: int) -> Callable[[int], Axis]:
    return lambda _: Axis(dim)


def _transposed_convolution(node: Any) -> list[Place]:
    blocks = max(1, _number(node, "group"))
    return [Place(1, lambda _: Axis(0, blocks=blocks))]


def _einsum(node: Any) -> list[Place]:
    """Each input along its first index that the output has not; none of one that is only scaled."""
    left, _, out = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms = left.split(",")
    if "->" not in node.attributes["equation"].as_string():
        out = "".join(letter for letter in left if left.count(letter) == 1)
    found = []
    for index, term in enumerate(terms):
        summed = [letter for letter in term if letter.isalpha() and letter not in out]
        if summed and len(terms) > 1:
            found.append(Place(index, _index_of(term, summed[0])))
    return found


def _index_of(term: str, letter: str) -> Callable[[int], Axis]:
    before, _, _ = term.partition(letter)
    dots = "..." in before
    return lambda ndim: Axis(ndim - len(term) + len(before) if dots else len(before))


_TABLE: dict[str, Callable[[Any], list[Place]]] = {
    "Gemm": _gemm(0, 1),
    "FusedGemm": _gemm(0, 1),
    "GemmFloat8": _gemm(0, 1),
    "QGemm": _gemm(0, 3, 2, 5),
    "MatMul": _matmul(0, 1),
    "FusedMatMul": _matmul(0, 1),
    "TransposeMatMul": _matmul(0, 1),
    "MatMulInteger": _matmul(0, 1, 2, 3),
    "MatMulIntegerToFloat": _matmul(0, 1, 4, 5),
    "DynamicQuantizeMatMul": _matmul(0, 1, None, 3),
    "QLinearMatMul": _matmul(0, 3, 2, 5),
    **dict.fromkeys(("Conv", "FusedConv", "DeformConv"), _at((1, 1, None))),
    "ConvInteger": _at((1, 1, 3)),
    "QLinearConv": _at((3, 1, 5)),
    "ConvTranspose": _transposed_convolution,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _at((1, 2, None), (2, 2, None))),
    "DynamicQuantizeLSTM": _at((1, 1, 9), (2, 1, 11)),
    "Attention": _at((1, 0, None)),
    "QAttention": _at((1, 0, 7)),
    "Einsum": _einsum,
}
_HARMLESS_NAMES = """
Add And BatchNormalization BiasAdd BiasGelu BitShift BitwiseAnd BitwiseOr BitwiseXor Cast CastLike Clip Compress
Concat ConcatFromSequence Constant ConstantOfShape DequantizeLinear Div DynamicQuantizeLinear EmbedLayerNormalization
Equal Expand FastGelu Flatten Gather GatherBlockQuantized GatherElements GatherND Gelu Greater GreaterOrEqual
GroupNormalization GroupQueryAttention Identity InstanceNormalization LayerNormalization Less LessOrEqual Max MaxUnpool
Mean Min Mod Mul MultiHeadAttention Neg Not NonMaxSuppression OneHot Or Pad Pow PRelu QLinearAdd QLinearConcat
QLinearMul QuantizeLinear QuickGelu RMSNormalization Reshape Resize RoiAlign RotaryEmbedding ScatterElements ScatterND
SequenceConstruct SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization Slice Split
Squeeze Sub Sum TensorScatter Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor Attention
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
