"""Sums that are normalized, `Add` and `LayerNormalization`, as one operator of ours: csrc/onnxruntime/normalize.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATOR = "AddLayerNormalization"


def write_normalizations(graph: ir.Graph, domain: str) -> int:
    """Rewrite each normalization over the last dim of a sum of two tensors of one shape; how many there were."""
    nodes = [node for node in graph if node.op_type == "LayerNormalization" and node.domain in ("", "ai.onnx")]
    return sum(_write(graph, node, domain) for node in nodes)


def _write(graph: ir.Graph, norm: ir.Node, domain: str) -> bool:
    import onnx_ir as ir

    total = norm.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or not _is_sum(add) or not _is_last(norm, total) or not _vectors(norm, total):
        return False
    alone = len(total.uses()) == 1 and not total.is_graph_output()
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    inputs, outputs = [*add.inputs, *norm.inputs[1:]], 1 if alone else 2
    new = ir.node(OPERATOR, inputs, {"epsilon": epsilon}, domain=domain, num_outputs=outputs, name=norm.name)
    old_values = [norm.outputs[0]] if alone else [norm.outputs[0], total]
    ir.convenience.replace_nodes_and_values(graph, add, [norm, add], [new], old_values, new.outputs)
    return True


def _is_sum(add: ir.Node) -> bool:
    """Whether a node adds two tensors of data, float32 and of one shape."""
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
        return False
    first, second = add.inputs
    return (
        first is not None
        and second is not None
        and same_shape(first, second)
        and not (first.const_value is not None or second.const_value is not None)
    )


def same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether two values have one dtype and one shape, all of whose dims have a number or a name."""
    known = first.shape is not None and None not in first.shape.dims
    return known and first.shape == second.shape and first.dtype == second.dtype


def _is_last(norm: ir.Node, total: ir.Value) -> bool:
    """Whether a node normalizes over the last dim, with nothing else asked of it."""
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    stash = norm.attributes["stash_type"].as_int() if "stash_type" in norm.attributes else 1
    last = total.shape is not None and axis in (-1, len(total.shape) - 1)
    return last and stash == 1 and not any(each.uses() or each.is_graph_output() for each in norm.outputs[1:])


def _vectors(norm: ir.Node, total: ir.Value) -> bool:
    """Whether scale and bias are constants in float32, a number for each of the last dim."""
    arrays = [each.const_value.numpy() if each.const_value is not None else None for each in norm.inputs[1:] if each]
    size = total.shape[-1] if total.shape is not None else None
    return all(array is not None and array.dtype == np.float32 and array.shape == (size,) for array in arrays)
