"""Rewrite matmuls by a constant matrix to `Gemm`: TensorRT looks for sparse tactics there and in `Conv` only.

The exporter writes a linear layer on more than two dims as `MatMul` and `Add`. Here

    x (..., K) -> Reshape (-1, K) -> Gemm with the unmodified weight, (O, K) or (K, O), and the bias -> Reshape (..., O)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def matmuls_to_gemms(graph: ir.Graph) -> int:
    """Rewrite every `MatMul` by a constant matrix, with the `Add` of a constant bias after it; returns how many.

    For the graph as the exporter makes it, before its optimizer folds the transposition of the weight into a copy.
    """
    rewritten = 0
    for node in list(graph):
        matrix = _matrix(node.inputs[1]) if node.op_type == "MatMul" else None
        if matrix is not None:
            _rewrite(graph, node, *matrix)
            rewritten += 1
    return rewritten


def _matrix(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The initializer of two dims that a value is, and whether transposed; None if it is no such thing."""
    node = value.producer() if value is not None else None
    transposed = node is not None and node.op_type == "Transpose" and node.attributes["perm"].as_ints() == (1, 0)
    if node is not None and transposed:
        value = node.inputs[0]
    if value is None or not value.is_initializer() or value.shape is None or len(value.shape) != 2:
        return None
    return value, transposed


def _rewrite(graph: ir.Graph, matmul: ir.Node, weight: ir.Value, transposed: bool) -> None:
    import onnx_ir as ir

    assert weight.const_value is not None
    K, outs = (int(str(size)) for size in weight.const_value.shape)
    if transposed:
        K, outs = outs, K
    inputs, old = [matmul.inputs[0], weight], [matmul]
    add = _add_of_bias(matmul.outputs[0], outs)
    if add is not None:
        inputs.append(next(value for value in add.inputs if value is not matmul.outputs[0]))
        old.append(add)
    new = _gemm(inputs, transposed, outs, K)
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, new, old[-1].outputs, new[-1].outputs)


def _add_of_bias(value: ir.Value, outs: int) -> ir.Node | None:
    """The node that adds a constant vector to a value which nothing else uses."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    others = [each for each in node.inputs if each is not value]
    if node.op_type != "Add" or len(others) != 1 or others[0] is None:
        return None
    vector = others[0].is_initializer() and others[0].shape is not None and list(others[0].shape) == [outs]
    return node if vector else None


def _gemm(inputs: Sequence[ir.Value | None], transposed: bool, outs: int, K: int) -> list[ir.Node]:
    """The nodes that replace a matmul; the last gives its result."""
    import onnx_ir as ir

    x, *rest = inputs
    attributes = {"transB": int(transposed)}
    if x is not None and x.shape is not None and len(x.shape) == 2:
        return [ir.node("Gemm", [x, *rest], attributes)]
    rows, columns = _ints(-1, K), _ints(outs)
    flat = ir.node("Reshape", [x, rows.outputs[0]])
    gemm = ir.node("Gemm", [flat.outputs[0], *rest], attributes)
    leading = ir.node("Shape", [x], {"start": 0, "end": -1})
    shape = ir.node("Concat", [leading.outputs[0], columns.outputs[0]], {"axis": 0})
    back = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
    return [rows, columns, flat, gemm, leading, shape, back]


def _ints(*numbers: int) -> ir.Node:
    import onnx_ir as ir

    return ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
