"""ONNX files of one operator of ours, and sessions of them."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime as runtime
import torch
from torch import Tensor

import openwork as ow
from openwork.files.packing import pack_weight
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask
from openwork.nm.pattern import Pattern


def sparse(shape: tuple[int, ...], pattern: str) -> Tensor:
    weight = torch.randn(shape)
    return weight * magnitude_mask(weight.abs(), Pattern.parse(pattern), Axis(1)) + 0.0


def model(
    op: str,
    weight: Tensor,
    pattern: str,
    vector: Tensor | None,
    x: list[Any],
    *,
    added: list[Any] | None = None,
    dtype: int = 1,
    y_dtype: int = 1,
    added_dtype: int = 1,
    **changed: Any,
) -> Any:
    """One node with a bias, `vector`. `x` and `added`: shapes of the data that it multiplies, in ONNX's `dtype`, and of
    what is added. `changed` replaces attributes, or initializers by the names values, indices, bias,
    scales."""
    n, m = Pattern.parse(pattern).n, Pattern.parse(pattern).m
    values, indices = pack_weight(weight, Pattern.parse(pattern), Axis(1))
    constants: dict[str, Any] = {"values": values.numpy(), "indices": indices.numpy()}
    constants |= {} if vector is None else {"bias": vector.numpy()}
    constants |= {name: changed.pop(name) for name in ("values", "indices", "bias", "scales") if name in changed}
    inputs = ["x", "values", "indices", *(name if name in constants else "" for name in ("bias", "scales"))]
    shapes = {"x": x, **({} if added is None else {"added": added}), "y": [None] * len(x)}
    inputs += [name for name in shapes if name == "added"]
    attributes = {"n": n, "m": m, "shape": list(weight.shape), "relu": 0}
    if "SparseConv2d" in op:
        attributes |= {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    if op.startswith("Q"):
        attributes |= {"relu": None, "group": None, "activation": 0, "x_scale": 0.02, "x_zero_point": 7}
        attributes |= {"y_scale": 0.05, "y_zero_point": 100, "added_scale": 0.03, "added_zero_point": 9}
    node = onnx.helper.make_node(op, inputs, ["y"], domain="openwork")
    for name, value in (attributes | changed).items():
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))
    made = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if array is not None]
    types = {"x": dtype, "y": y_dtype, "added": added_dtype}
    data = [onnx.helper.make_tensor_value_info(name, types[name], shapes[name]) for name in shapes]
    graph = onnx.helper.make_graph([node], "one", data[:-1], data[-1:], made)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("openwork", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(file: Any, threads: int = 1) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(ow.onnxruntime_library())
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def ran(file: Any, x: Tensor, threads: int = 1) -> Tensor:
    return torch.from_numpy(session(file, threads).run(None, {"x": x.numpy()})[0])
