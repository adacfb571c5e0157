"""Which matmuls and convolutions of an ONNX file have a constant operand, and how sparse it is along their sum."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwork.export.constants import Constant, Constants, is_matrix
from openwork.export.onnx_operands import Place, is_harmless, places, zeros_of
from openwork.export.operators import DOMAIN, OPERATORS, compressed
from openwork.files.reader import open_files
from openwork.files.recognize import recognized
from openwork.files.strict_json import is_text_mapping, strict_json
from openwork.nm.groups import Axis, reduction_size
from openwork.nm.masks import too_dense
from openwork.nm.pattern import Pattern
from openwork.training.selection import PatternChoice, Selection, matches
from openwork.training.verify import NotSparse, tightest
from openwork.utils.atomic import open_plain
from openwork.utils.counted import counted

KEY = "openwork"  # in the metadata of the file: {"fc.weight": "2:4"}, what was recorded of each constant
DENSE_KEY = "openwork_dense"  # {"head.weight": "MatMul"}: the constants that were dense when it was written
TENSORRT_SPARSE = ("MatMul", "Gemm", "Conv")  # where TensorRT looks for sparse tactics, MatMul since 10.3
_QUANTIZED = re.compile(r"(_(transposed|quantized|QuantizeLinear|DequantizeLinear))+$", re.IGNORECASE)
_ALLOW = "what is to stay dense is named by allow_dense=[...] (--allow-dense), or excluded where a pattern is given"


@dataclass(frozen=True)
class MatMul:
    """A node that multiplies by a constant weight (matmul, convolution, RNN), and the weight. `pattern` is what it was
    held to where `recorded`, else the tightest that it satisfies, or None where that is dense; `reason` says why it
    may be. `density` is the share that is not zero."""

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: Axis
    density: float
    pattern: Pattern | None = None
    recorded: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Unfollowed:
    """A node that takes a constant of two dims or more, and may multiply by it: `problem` says what is not known.
    `matmul` is what it may be, with a density of 1."""

    matmul: MatMul
    problem: str


ConstantProduct = tuple[MatMul, Tensor] | Unfollowed


def check_onnx(
    path: str | os.PathLike[str],
    pattern: Selection | PatternChoice | None = None,
    *,
    allow_dense: Sequence[str] = (),
) -> tuple[MatMul, ...]:
    """Every matmul and convolution by a constant weight of an ONNX file; raises NotSparse with those too dense, and
    with those that are not accounted for.

    Held to what `to_onnx` wrote into the file, or to `pattern`, but where M does not divide the axis. What is computed
    from constants is a constant; a quantized one is zero where it equals its zero point. Accounted for is a matmul that
    keeps its pattern, or one as sparse; what the file records as dense; what is excluded; what M does not divide; what
    the globs of `allow_dense` name. An operator that takes a constant and is not known is not accounted for. Without a
    record and a pattern nothing is held, and the tightest pattern of each is found. Raises ValueError for a file that
    is not valid ONNX.
    """
    selection, model = Selection.of(pattern), _loaded(path)
    holding = _Holding(
        selection,
        _recorded(model.metadata_props.get(KEY, "{}"), KEY),
        _texts(model.metadata_props.get(DENSE_KEY, "{}"), DENSE_KEY),
        tuple(allow_dense),
    )
    for product in constant_products(model):
        holding.take(product)
    holding.check()
    return tuple(holding.matmuls)


@dataclass
class _Holding:
    """What a file is held to, and what was found so far."""

    selection: Selection
    recorded: Mapping[str, Pattern]
    dense: Mapping[str, str]
    allowed: tuple[str, ...]
    matmuls: dict[MatMul, None] = field(default_factory=dict)  # those that are alike once
    held: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)
    unaccounted: dict[str, str] = field(default_factory=dict)

    def take(self, product: ConstantProduct) -> None:
        """Account for one product."""
        if isinstance(product, Unfollowed):
            matmul = product.matmul
            reason = self._reason(matmul.name)
            self.matmuls[replace(matmul, reason=reason)] = None
            if not reason:
                self.unaccounted[matmul.name] = f"{matmul.op}: {product.problem}"
            return
        matmul, mask = product
        name = self._recorded_name(matmul.name)
        required = self._required(matmul, name)
        problem = too_dense(mask, required, matmul.axis) if required else ""
        if required and not problem:
            self.held.add(name)
            matmul = replace(matmul, pattern=required, recorded=True)
        else:
            matmul = self._inferred(matmul, mask, name, problem)
        self.matmuls[matmul] = None

    def check(self) -> None:
        """Raises NotSparse for what is denser than it should be, missing, or not accounted for."""
        gone = [name for name in self.recorded if name not in self.held and name not in self.broken]
        broken = dict.fromkeys(gone, "recorded by the file, but nothing multiplies by it")
        for name, problem in self.broken.items():
            if name not in self.held:
                broken[name] = problem
            elif not self._reason(name):
                self.unaccounted[name] = f"multiplied along another axis too, where {problem}"
        unaccounted = {name: problem for name, problem in self.unaccounted.items() if name not in broken}
        if broken or unaccounted:
            raise NotSparse(broken | unaccounted, _ALLOW if unaccounted else "", unaccounted)

    def _recorded_name(self, name: str) -> str:
        """The name before ONNX Runtime quantized the weight, where only that is known."""
        before = _QUANTIZED.sub("", name)
        known = (*self.recorded, *self.dense)
        return before if before in known and name not in known else name

    def _required(self, matmul: MatMul, name: str) -> Pattern | None:
        given = self.selection.pattern_of(name)
        if given is None:
            return self.recorded.get(name)
        return given if _divides(given, matmul) else None

    def _inferred(self, matmul: MatMul, mask: Tensor, name: str, problem: str) -> MatMul:
        """A matmul that is not held: with the tightest pattern it has, or the reason why it may be dense."""
        tight, reason = tightest(mask, matmul.axis), self._reason(name)
        known = [*self.recorded.values(), *self.selection.patterns.values()]
        matmul = replace(matmul, pattern=None if tight.is_dense else tight)
        is_sparse = matmul.pattern and (not known or tight.density <= max(each.density for each in known))
        if problem:
            self.broken.setdefault(name, problem)
        elif not is_sparse and not reason:
            if not any(_divides(each, matmul) for each in known or [Pattern(2, 4)]):
                reason = f"reduction axis has {counted(reduction_size(matmul.shape, matmul.axis), 'weight')}"
            elif known:
                self.unaccounted[name] = f"{matmul.op} by a dense constant {matmul.shape}, of which nothing is recorded"
        return replace(matmul, reason=reason)

    def _reason(self, name: str) -> str:
        """Why a constant may be dense; empty where nothing says so."""
        before = self._recorded_name(name)
        if before in self.dense:
            return "recorded as dense"
        for what, globs in (("excluded", self.selection.exclude), ("allowed", self.allowed)):
            glob = next((glob for glob in globs if matches(glob, before) or matches(glob, name)), None)
            if glob is not None:
                return f"{what} by {glob!r}"
        return ""


def _divides(pattern: Pattern, matmul: MatMul) -> bool:
    return reduction_size(matmul.shape, matmul.axis) % pattern.m == 0


def _loaded(path: str | os.PathLike[str]) -> Any:
    import onnx
    import onnx_ir
    from onnx_ir.passes import common

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    with open_files(path, [Path(path)]):
        pass  # refuses what is no plain file
    try:  # the checker also refuses external data outside of the folder, so it comes first
        onnx.checker.check_model(os.fspath(path))
        model = onnx_ir.load(path)
        model = common.InlinePass()(model).model if model.functions else model
    except Exception as error:  # protobuf, onnx and onnx_ir each have their own
        raise ValueError(f"{os.fspath(path)} is no valid ONNX file: {_reason(path, error)}") from error
    log = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before, log.disabled = log.disabled, True  # shapes that cannot be inferred are not known, which is enough
    try:
        return common.ShapeInferencePass()(model).model
    finally:
        log.disabled = before


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    with open_plain(path) as file:
        what, to_do = recognized(file)
    return str(error)[:500] if what in ("", "an ONNX model") else f"it is {what}; {to_do}"


def _texts(text: str, key: str) -> dict[str, str]:
    texts = strict_json(text)
    if not is_text_mapping(texts):
        raise ValueError(f"the metadata {key!r} of the file does not map names to texts: it was damaged")
    return texts


def _recorded(text: str, key: str) -> dict[str, Pattern]:
    return {name: Pattern.parse(pattern) for name, pattern in _texts(text, key).items()}


def constant_matmuls(model: Any) -> Iterator[tuple[MatMul, Tensor]]:
    """(the matmul, which of its weights are not zero) of an onnx_ir.Model, also inside of branches and functions."""
    return (product for product in constant_products(model) if not isinstance(product, Unfollowed))


def constant_products(model: Any) -> Iterator[ConstantProduct]:
    """The same, and the nodes that may multiply by a constant, but are not known or cannot be read."""
    import onnx_ir

    for graph in (model.graph, *model.functions.values()):
        constants = Constants()
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            found = [constants.of(value) for value in node.inputs if value is not None]
            if any(constant is None or constant.scaled for constant in found):
                yield from _products(node, constants)


def _products(node: Any, constants: Constants) -> Iterator[ConstantProduct]:
    """What a node multiplies that has data to multiply with."""
    if node.domain == DOMAIN and node.op_type in OPERATORS:
        yield _compressed(node, constants)
        return
    found = places(node)
    for place in found:
        constant = constants.of(node.inputs[place.index]) if place.index < len(node.inputs) else None
        if constant is not None and (constant.array is None or (constant.array.ndim >= 2 and constant.array.size)):
            yield _product(node, place, constant, constants)
    if found or is_harmless(node):
        return
    for value in node.inputs:
        constant = constants.of(value)
        if constant is not None and (constant.scaled or is_matrix(constant)):
            yield from _unfollowed(node, value, constant)


def _product(node: Any, place: Place, constant: Constant, constants: Constants) -> ConstantProduct:
    zero, given = None, place.zero is not None and place.zero < len(node.inputs) and node.inputs[place.zero]
    if given:
        zero = constants.of(given)
    if constant.scaled and constant.array is None:
        return Unfollowed(_unread(node, constant), "multiplied after it was changed by data")
    if constant.array is None or (given and (zero is None or zero.array is None)):
        return Unfollowed(_unread(node, constant), "its numbers cannot be read")
    mask = torch.from_numpy(zeros_of(constant.array, zero.array if zero else None, place))
    axis, share = place.axis(mask.ndim), float(mask.float().mean())
    return MatMul(node.op_type, constant.name, tuple(mask.shape), str(constant.array.dtype), axis, share), mask


def _compressed(node: Any, constants: Constants) -> ConstantProduct:
    """Of an operator of ours; raises ValueError where its weight is none of docs/format.md."""
    values, indices = (constants.of(value) for value in node.inputs[1:3])
    name = str(node.inputs[1].name).removesuffix(".values")
    if values is None or indices is None or values.array is None or indices.array is None:
        return Unfollowed(MatMul(node.op_type, name, (), "", Axis(1), 1.0), "its numbers cannot be read")
    try:
        mask = compressed(node, values.array, indices.array)[0] != 0
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} of {node.op_type} is damaged: {error}") from error
    density = float(mask.float().mean())
    return MatMul(node.op_type, name, tuple(mask.shape), str(values.array.dtype), Axis(1), density), mask


def _unfollowed(node: Any, value: Any, constant: Constant) -> Iterator[Unfollowed]:
    """Of a sum only where it is one of products; any other operator is not known."""
    if node.op_type.startswith("Reduce"):
        producer = value.producer()
        if constant.scaled and producer is not None and producer.op_type == "Mul":
            yield Unfollowed(_unread(node, constant), "multiplied by data one by one and summed")
        return
    yield Unfollowed(_unread(node, constant), "this operator is not one that verify can follow")


def _unread(node: Any, constant: Constant) -> MatMul:
    shape, dtype = ((), "") if constant.array is None else (constant.array.shape, str(constant.array.dtype))
    return MatMul(node.op_type, constant.name, tuple(shape), dtype, Axis(0), 1.0)


def as_metadata(texts: Mapping[str, object]) -> str:
    """What `check_onnx` reads again."""
    return json.dumps({name: str(text) for name, text in sorted(texts.items())})


def dense_names(products: Iterable[ConstantProduct], recorded: Mapping[str, Pattern]) -> dict[str, str]:
    """The constants that are not as sparse as `recorded` where they are multiplied -> the operator."""
    most = max((pattern.density for pattern in recorded.values()), default=0.0)
    dense = {}
    for product in products:
        if isinstance(product, Unfollowed):
            dense[product.matmul.name] = product.matmul.op
            continue
        matmul, mask = product
        required = recorded.get(matmul.name)
        if too_dense(mask, required, matmul.axis) if required else tightest(mask, matmul.axis).density > most:
            dense[matmul.name] = matmul.op
    return dense
