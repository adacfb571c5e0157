"""How linear layers on more than two dims are written: torch's exporter makes

    x (..., K) -> MatMul with Transpose(weight (O, K)) -> Add of the bias

`MatMul`, as every runtime looks for it (and fuses attention around it), then has the transposed weight as its constant,
under the weight's name. `Gemm` has the weight as it is, between two Reshapes: for runtimes that look for sparse weights
there and in `Conv` only, as TensorRT did before 10.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

LinearAs = Literal["MatMul", "Gemm"]


def write_linear_layers(graph: ir.Graph, linear: LinearAs) -> frozenset[str]:
    """Rewrite the linear layers of a graph; the names of the weights that lie in it transposed from now on.

    For the graph as the exporter makes it, before its optimizer folds transposed weights into copies without a name.
    """
    names: list[str] = []
    if linear == "MatMul":
        names = [name for name, weight in list(graph.initializers.items()) if _transpose(weight)]
    for node in list(graph):
        matrix = _matrix(node.inputs[1]) if node.op_type == "MatMul" else None
        if matrix is not None and (linear == "Gemm" or matrix[1]):  # what is tied to an embedding stays as it lies
            _to_gemm(graph, node, *matrix)
    return frozenset(names)


def _transpose(weight: ir.Value) -> bool:
    """Transpose a weight in place where all that use it can take it so, and a MatMul does; whether it was."""
    import onnx_ir as ir

    uses = list(weight.uses())
    transposes = [use.node for use in uses if _is_transpose(use.node)]
    gemms = [use.node for use in uses if use.node.op_type == "Gemm" and use.idx == 1]
    if not transposes or len(transposes) + len(gemms) < len(uses) or weight.is_graph_output():
        return False
    assert weight.const_value is not None
    transposed = np.ascontiguousarray(weight.const_value.numpy().T)
    weight.const_value, weight.shape = ir.tensor(transposed, name=weight.name), ir.Shape(transposed.shape)
    for gemm in gemms:
        gemm.attributes["transB"] = ir.AttrInt64("transB", 1 - _int(gemm, "transB"))
    for node in transposes:
        ir.convenience.replace_all_uses_with(node.outputs[0], weight, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return True


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and "perm" in node.attributes and node.attributes["perm"].as_ints() == (1, 0)


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _matrix(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The initializer of two dims that a value is, and whether transposed; None if it is no such thing."""
    node = value.producer() if value is not None else None
    transposed = node is not None and _is_transpose(node)
    if node is not None and transposed:
        value = node.inputs[0]
    if value is None or not value.is_initializer() or value.shape is None or len(value.shape) != 2:
        return None
    return value, transposed


def _to_gemm(graph: ir.Graph, matmul: ir.Node, weight: ir.Value, transposed: bool) -> None:
    import onnx_ir as ir

    assert weight.const_value is not None
    K, outs = (int(str(size)) for size in weight.const_value.shape)
    if transposed:
        K, outs = outs, K
    inputs, old = [matmul.inputs[0], weight], [matmul]
    add = add_of_bias(matmul.outputs[0], outs)
    if add is not None:
        inputs.append(next(value for value in add.inputs if value is not matmul.outputs[0]))
        old.append(add)
    new = _gemm(inputs, transposed, outs, K)
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, new, old[-1].outputs, new[-1].outputs)


def add_of_bias(value: ir.Value, outs: int) -> ir.Node | None:
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
