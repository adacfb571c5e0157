"""Which matmuls and convolutions of an ONNX file have a constant operand, and how sparse it is along their sum."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openwork.files.strict_json import is_text_mapping, strict_json
from openwork.nm.groups import Axis, reduction_size
from openwork.nm.masks import too_dense
from openwork.nm.pattern import Pattern
from openwork.training.selection import PatternChoice, Selection
from openwork.training.verify import NotSparse, tightest

KEY = "openwork"  # in the metadata of the file: {"fc.weight": "2:4"}, what was recorded of each constant
TENSORRT_SPARSE = ("MatMul", "Gemm", "Conv")  # where TensorRT looks for sparse tactics, MatMul since 10.3


@dataclass(frozen=True)
class MatMul:
    """A node that multiplies by a constant weight (matmul, convolution, RNN), and the weight. `pattern` is what it was
    held to where `recorded`, else the tightest that it satisfies, or None where that is dense. `density` is the share
    that is not zero."""

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: Axis
    density: float
    pattern: Pattern | None = None
    recorded: bool = False


def check_onnx(path: str | os.PathLike[str], pattern: Selection | PatternChoice | None = None) -> tuple[MatMul, ...]:
    """Every matmul and convolution by a constant weight of an ONNX file; raises NotSparse with those too dense.

    Held to what `to_onnx` wrote into the file, or to `pattern`, but where M does not divide the axis; without either
    nothing is held, and the tightest pattern of each is found. A constant that is summed over along two axes is held
    along one of them. Raises ValueError for a file that is not valid ONNX.
    """
    selection, model = Selection.of(pattern), _loaded(path)
    recorded = _recorded(model.metadata_props.get(KEY, "{}"))
    matmuls: dict[object, MatMul] = {}
    broken = dict.fromkeys(recorded, "recorded by the file, but nothing multiplies by it")
    holding = set()
    for matmul, mask in constant_matmuls(model):
        required = recorded.get(matmul.name)
        if (given := selection.pattern_of(matmul.name)) is not None:
            required = given if reduction_size(matmul.shape, matmul.axis) % given.m == 0 else None
        problem = too_dense(mask, required, matmul.axis) if required else ""
        if problem:
            broken[matmul.name] = problem
        elif required:
            holding.add(matmul.name)
        matmuls[matmul.op, matmul.name, matmul.axis] = _described(matmul, mask, None if problem else required)
    if broken := {name: problem for name, problem in broken.items() if name not in holding}:
        raise NotSparse(broken)
    return tuple(matmuls.values())


def _described(matmul: MatMul, mask: Tensor, required: Pattern | None) -> MatMul:
    if required is not None:
        return replace(matmul, pattern=required, recorded=True)
    tight = tightest(mask, matmul.axis)
    return replace(matmul, pattern=tight if tight.n < tight.m else None)


def _loaded(path: str | os.PathLike[str]) -> Any:
    import onnx
    import onnx_ir

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:  # the checker also refuses external data outside of the folder, so it comes first
        onnx.checker.check_model(os.fspath(path))
        return onnx_ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each have their own
        raise ValueError(f"{os.fspath(path)} is no valid ONNX file: {str(error)[:500]}") from error


def _recorded(text: str) -> dict[str, Pattern]:
    patterns = strict_json(text)
    if not is_text_mapping(patterns):
        raise ValueError(f"the metadata {KEY!r} of the file does not map names to patterns: it was damaged")
    return {name: Pattern.parse(pattern) for name, pattern in patterns.items()}


def constant_matmuls(model: Any) -> Iterator[tuple[MatMul, Tensor]]:
    """(the matmul, which of its weights are not zero) of an onnx_ir.Model, also inside of branches and functions."""
    import onnx_ir

    for graph in (model.graph, *model.functions.values()):
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            for place, axis in _operands(node):
                constant = _constant(node.inputs[place]) if place < len(node.inputs) else None
                if constant is not None and constant[1].ndim >= 2 and constant[1].size:
                    name, weight = constant
                    mask = torch.from_numpy(weight != 0)
                    share = float(mask.float().mean())
                    yield MatMul(node.op_type, name, tuple(mask.shape), str(weight.dtype), axis(mask), share), mask


def _operands(node: Any) -> list[tuple[int, Any]]:
    """(input, its reduction axis as a function of it) of a node that multiplies matrices."""

    def attribute(name: str, default: int) -> int:
        return node.attributes[name].as_int() if name in node.attributes else default

    match node.op_type:
        case "Gemm":
            return [(0, lambda _: Axis(1 - attribute("transA", 0))), (1, lambda _: Axis(attribute("transB", 0)))]
        case "MatMul":
            return [(0, lambda weight: Axis(weight.ndim - 1)), (1, lambda weight: Axis(weight.ndim - 2))]
        case "Conv":
            return [(1, lambda _: Axis(1))]
        case "ConvTranspose":
            return [(1, lambda _: Axis(0, blocks=attribute("group", 1)))]
        case "LSTM" | "GRU" | "RNN":
            return [(1, lambda _: Axis(2)), (2, lambda _: Axis(2))]
    return []


def _constant(value: Any) -> tuple[str, Any] | None:
    """Name and numpy array of a constant, seen through what only moves or converts it."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.name, value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return value.name, node.attributes["value"].as_tensor().numpy()
    inner = _constant(node.inputs[0]) if node.op_type in ("Identity", "Transpose", "Cast") else None
    if inner is None or node.op_type != "Transpose":
        return inner
    axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    return inner[0], inner[1].transpose(axes)


def as_metadata(recorded: dict[str, Pattern]) -> str:
    """What `check_onnx` reads again."""
    return json.dumps({name: str(pattern) for name, pattern in sorted(recorded.items())})
