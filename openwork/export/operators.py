"""Matmuls and convolutions of an ONNX graph as our operators, `SparseLinear` and `SparseConv2d` of the domain
`openwork`, with the weight compressed: its values and indices (docs/format.md) under its name; and what is around them
(`normalization`). Those on bytes are there already (`int8`). csrc/onnxruntime has what runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from openwork.export.linear import add_of_bias
from openwork.export.normalization import same_shape, write_normalizations
from openwork.files.packing import pack_weight, unpack_weight
from openwork.nm.groups import Axis
from openwork.nm.masks import too_dense
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight

if TYPE_CHECKING:
    import onnx_ir as ir

Operators = Literal["standard", "openwork"]
DOMAIN, VERSION = "openwork", 1
BYTES_OPERATORS = ("QSparseLinear", "QSparseLinearToFloat", "QSparseConv2d", "QSparseConv2dToFloat")
OPERATORS = ("SparseLinear", "SparseConv2d", *BYTES_OPERATORS)
HINT_KEY = "openwork_operators"  # in the metadata of the file: what whoever lacks the library is to do
HINT = (
    "This file has operators of the domain 'openwork': pip install openwork, and then "
    "options.register_custom_ops_library(openwork.onnxruntime_library()) before the session is made. The library needs "
    "nothing else, so its file is all that a product has to bring."
)
MOST = 0.5  # the densest pattern that is written so: denser ones are faster dense


@dataclass(frozen=True)
class _Layer:
    """A node that multiplies by the constant `weight`, as (O, K) or (O, C, R, S): `old` are the nodes of which the
    first multiplies and the others add the bias and `added`, of the output's shape, and cut off negative numbers."""

    weight: ir.Value
    dense: np.ndarray[Any, Any]
    bias: ir.Value | None
    added: ir.Value | None
    old: tuple[ir.Node, ...]
    relu: bool


def write_operators(model: ir.Model, kept: Mapping[str, Pattern], dtype: torch.dtype = torch.float32) -> int:
    """Rewrite what multiplies by the weights of `kept`, by name, and return how many nodes were. `dtype`: float32, or
    int8 with one scale an output. Raises ValueError where there is none."""
    graph, packed = model.graph, dict[str, tuple[Any, ...]]()
    written = sum(node.domain == DOMAIN for node in graph)
    for node in list(graph):
        layer = _layer(node)
        pattern = kept.get(layer.weight.name or "") if layer else None
        if layer is None or pattern is None or pattern.density > MOST:
            continue
        weight = torch.from_numpy(layer.dense) + 0.0  # a zero that was scaled may be -0.0
        if too_dense(weight != 0, pattern, Axis(1)):
            continue
        name = str(layer.weight.name)
        if name not in packed:
            packed[name] = _initializers(graph, name, weight, pattern, dtype)
        _replace(graph, layer, pattern, packed[name])
        if not layer.weight.uses() and not layer.weight.is_graph_output():
            graph.initializers.pop(name, None)
        written += 1
    if not written:
        raise ValueError(
            "operators='openwork': no linear layer or 2-d convolution in float32 has a pattern that keeps half of its "
            "weights or fewer, so nothing would be sparse: give pattern='2:4' or leave operators out"
        )
    write_normalizations(graph, DOMAIN)
    for node in graph:
        node.doc_string = HINT.partition(" and then ")[0].rstrip(",") if node.domain == DOMAIN else node.doc_string
    graph.opset_imports[DOMAIN] = VERSION
    model.doc_string = HINT
    model.metadata_props[HINT_KEY] = HINT
    return written


def compressed(node: ir.Node, values: np.ndarray[Any, Any], indices: np.ndarray[Any, Any]) -> tuple[Tensor, Pattern]:
    """The dense weight of a node of ours, and its pattern. Raises ValueError where they do not fit one another."""
    n, m = (node.attributes[name].as_int() for name in ("n", "m"))
    pattern, shape = Pattern(n, m), tuple(node.attributes["shape"].as_ints())
    return unpack_weight(torch.tensor(values), torch.tensor(indices), pattern, Axis(1), shape), pattern


def _layer(node: ir.Node) -> _Layer | None:
    """What a node multiplies by, if our operators can: float32, and a bias for each output."""
    weight = node.inputs[1] if node.domain in ("", "ai.onnx") and len(node.inputs) > 1 else None
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    array = weight.const_value.numpy()
    if array.dtype != np.float32 or array.ndim != {"MatMul": 2, "Gemm": 2, "Conv": 4}.get(node.op_type):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "Conv":
        return _finished(node, weight, array, bias) if _text(node, "auto_pad", "NOTSET") == "NOTSET" else None
    if node.op_type == "MatMul":
        return _finished(node, weight, array.T, None)
    plain = not _number(node, "transA") and _real(node, "alpha") == 1 and (bias is None or _real(node, "beta") == 1)
    return _finished(node, weight, array if _number(node, "transB") else array.T, bias) if plain else None


def _finished(node: ir.Node, weight: ir.Value, dense: np.ndarray[Any, Any], bias: ir.Value | None) -> _Layer | None:
    old, outs = [node], len(dense)
    if bias is not None and not _is_vector(bias, outs):
        return None
    if bias is None and (add := add_of_bias(node.outputs[0], outs)) is not None:
        bias = next(value for value in add.inputs if value is not node.outputs[0])
        old.append(add)
    added, add = _residual(old[-1].outputs[0]) if node.op_type == "Conv" else (None, None)
    if add is not None:
        old.append(add)
    uses = list(old[-1].outputs[0].uses())
    relu = len(uses) == 1 and uses[0].node.op_type == "Relu" and not old[-1].outputs[0].is_graph_output()
    if relu:
        old.append(uses[0].node)
    return _Layer(weight, np.ascontiguousarray(dense), bias, added, tuple(old), relu)


def _residual(value: ir.Value) -> tuple[ir.Value, ir.Node] | tuple[None, None]:
    """What is added to a value which nothing else uses, of its shape, and by which node."""
    uses = list(value.uses())
    node = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    other = next((each for each in node.inputs if each is not value), None) if node is not None else None
    if node is None or node.op_type != "Add" or other is None or other.const_value is not None:
        return None, None
    return (other, node) if same_shape(value, other) else (None, None)


def _is_vector(value: ir.Value, outs: int) -> bool:
    array = value.const_value.numpy() if value.is_initializer() and value.const_value is not None else None
    return array is not None and array.dtype == np.float32 and array.shape == (outs,)


def _initializers(
    graph: ir.Graph, name: str, weight: Tensor, pattern: Pattern, dtype: torch.dtype
) -> tuple[ir.Value, ...]:
    """The values and the indices, and of int8 the scales, added to the graph."""
    import onnx_ir as ir

    def added(suffix: str, tensor: Tensor) -> ir.Value:
        constant = ir.tensor(tensor.numpy(), name=f"{name}.{suffix}")
        kind, shape = ir.TensorType(constant.dtype), ir.Shape(tensor.shape)
        value = ir.Value(name=constant.name, shape=shape, type=kind, const_value=constant)
        graph.register_initializer(value)
        return value

    numbers, scales = quantize_weight(weight, dtype)
    values, indices = pack_weight(numbers, pattern, Axis(1))
    packed = added("values", values), added("indices", indices)
    return packed if scales is None else (*packed, added("scales", scales))


def _replace(graph: ir.Graph, layer: _Layer, pattern: Pattern, packed: tuple[ir.Value, ...]) -> None:
    import onnx_ir as ir

    node, last = layer.old[0], layer.old[-1]
    attributes: dict[str, Any] = {"n": pattern.n, "m": pattern.m, "shape": list(layer.dense.shape)}
    attributes["relu"] = int(layer.relu)
    is_conv = node.op_type == "Conv"
    if is_conv:
        for name, default in (("strides", [1, 1]), ("pads", [0] * 4), ("dilations", [1, 1])):
            attributes[name] = [*node.attributes[name].as_ints()] if name in node.attributes else default
        attributes["group"] = _number(node, "group", 1)
    inputs = [node.inputs[0], *packed[:2], layer.bias, *(packed[2:] or [None]), layer.added]
    while inputs[-1] is None:
        inputs.pop()
    new = ir.node("SparseConv2d" if is_conv else "SparseLinear", inputs, attributes, domain=DOMAIN, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, last, layer.old, [new], last.outputs, new.outputs)


def _number(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _real(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default
