"""ONNX: what ONNX Runtime, OpenVINO and TensorRT load. The zeros lie in constant weights."""

from __future__ import annotations

import os
import re
import secrets
import stat
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from openwork.export.check import (
    DENSE_KEY,
    KEY,
    MatMul,
    as_metadata,
    check_onnx,
    constant_matmuls,
    constant_products,
    dense_names,
)
from openwork.export.int8 import int8_module
from openwork.export.linear import LinearAs
from openwork.export.operators import Operators, write_operators
from openwork.export.outputs import check_equal, folded, outputs
from openwork.files.model_state import Placed, masked_by_name, patterns
from openwork.inference.plan import Int8Network
from openwork.kernels.cpu.onnxruntime_operators import onnxruntime_library
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import unwrap
from openwork.training.selection import PatternChoice, Selection
from openwork.utils.atomic import atomic_file, sync
from openwork.utils.caller import outside
from openwork.utils.counted import counted
from openwork.utils.deployed import check_not_deployed
from openwork.utils.example import arguments, quiet
from openwork.utils.torch_private import decompositions, tree_leaves

_INT8_ERROR = 0.2  # of the largest output: a network that is off by more does not stand int8, or something is broken
_PROTOBUF_LIMIT = 2_000_000_000  # bytes; weights of larger models lie in a second file


@dataclass(frozen=True)
class Exported:
    """What was written. `matmuls`: each matmul and convolution by a constant weight. `difference`: the largest
    difference of ONNX Runtime's outputs to the model's, as a share of the largest output; None where onnxruntime, or
    the library of our operators, is not installed. `nbytes`: of the file, and of the one beside it that holds large
    weights. `network`: which layers multiply bytes, where `calibrate` was given."""

    matmuls: tuple[MatMul, ...]
    difference: float | None
    nbytes: int = 0
    network: Int8Network | None = None


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    pattern: Selection | PatternChoice | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    linear: LinearAs = "MatMul",
    operators: Operators = "standard",
    weight_dtype: torch.dtype = torch.float32,
    calibrate: Iterable[Any] | None = None,
) -> Exported:
    """Write a model as ONNX, and check the file before it gets its name: the ONNX checker, N:M along the axis that
    each matmul sums over, and ONNX Runtime's outputs for `example`.

    `example` is a tensor, a tuple of arguments or a mapping of keyword arguments. A model that is still sparsified is
    exported as finalized; a plain one is held to `pattern` as in `ow.save`.
    `dynamic_shapes` as in torch.export.export: without it the file takes inputs of the example's shape alone. Weights
    of more than 2 GB, which one file cannot hold, go to a second one in the folder, `path`.<8 hexadecimal digits>.data.
    `opset` is the version of ONNX's operators (default: torch's choice), `input_names` and `output_names` what the
    file calls each tensor that goes in and comes out, in order. `linear`: the operator of linear layers on more than
    two dims, "MatMul", or "Gemm" between two Reshapes (see docs/deploy/onnx.md on TensorRT). `operators`: "openwork"
    writes sparse layers as operators of ours, which the library at `ow.onnxruntime_library()` runs, with weights in
    `weight_dtype`; with int8 and `calibrate`, examples of real data, activations stay int8 from layer to layer, as in
    `ow.deploy`.
    Raises NotSparse, ValueError for names and versions that do not fit, where no layer is one for our operators, and
    from the checker, RuntimeError for other outputs, and what torch.onnx.export raises.
    """
    for argument, given, known in (("linear", linear, LinearAs), ("operators", operators, Operators)):
        if given not in get_args(known):
            raise ValueError(f"{argument} has to be {' or '.join(map(repr, get_args(known)))}, not {given!r}")
    if weight_dtype not in (torch.float32, torch.int8) or (weight_dtype == torch.int8 and operators == "standard"):
        raise ValueError(f"weight_dtype={weight_dtype}: float32, or int8 with operators='openwork'")
    if calibrate is not None and weight_dtype != torch.int8:
        raise ValueError(
            "calibrate is for weight_dtype=torch.int8 with operators='openwork' (--weight-dtype int8 --to onnxruntime)"
        )
    inner = unwrap(model)
    check_not_deployed(inner, "exporting to ONNX")
    recorded = patterns(inner, masked_by_name(inner), pattern)
    plain, renamed = folded(model)
    recorded = {renamed.get(name, name): placed for name, placed in recorded.items()}
    int8, network = (None, None) if calibrate is None else int8_module(inner, example, pattern, calibrate)
    if network is not None and network.reason:
        warnings.warn(f"calibrate: no int8 network, layer by layer instead: {network.reason}", stacklevel=outside())
    written = plain if int8 is None else int8
    with quiet(written):
        exported = _exported(written, example, dynamic_shapes, opset)
    _rename(exported.model.graph, input_names, output_names)
    transposed = _finish(exported, linear)
    kept = _kept(exported.model, recorded, transposed)
    if operators == "openwork":
        write_operators(exported.model, kept, weight_dtype if int8 is None else torch.float32)
    dense = dense_names(constant_products(exported.model), kept)
    exported.model.metadata_props.update({KEY: as_metadata(kept), DENSE_KEY: as_metadata(dense)})
    target = Path(os.path.realpath(path))
    data = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
    with atomic_file(target, ".part.onnx") as part, _deleted_on_error(data):
        _save(exported.model, part, data)
        if data.exists() and target.exists():
            data.chmod(stat.S_IMODE(target.stat().st_mode))  # as secret as the file that is replaced
        matmuls = check_onnx(part)
        difference = _compare(part, plain, example, operators, _INT8_ERROR if weight_dtype == torch.int8 else 0.0)
    _delete_former_weights(target, data)
    nbytes = sum(file.stat().st_size for file in (target, data) if file.exists())
    return Exported(matmuls, difference, nbytes, network)


def _exported(model: nn.Module, example: Any, dynamic_shapes: Any, opset: int | None) -> Any:
    """torch's ONNX program of a model, not yet optimized."""
    args, kwargs = arguments(model, example)
    options: dict[str, Any] = {"opset_version": opset, "dynamo": True, "optimize": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, about its own pytree
        if projected := [name for name, module in model.named_modules() if getattr(module, "proj_size", 0)]:
            program: Any = torch.onnx.export(_unrolled(model, projected, args, kwargs, dynamic_shapes), **options)
        else:
            program = torch.onnx.export(model, args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, **options)
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ValueError(f"opset={opset}: torch's exporter could not write it, only {written}")
    return program


def _unrolled(model: nn.Module, projected: Sequence[str], args: Any, kwargs: Any, dynamic_shapes: Any) -> Any:
    """A model's torch.export program in which every LSTM is a matmul for each time step."""
    warnings.warn(
        f"ONNX's LSTM knows no proj_size: {', '.join(projected)} is written step by step, for sequences as long as the "
        "example's",
        stacklevel=outside(),
    )
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return program.run_decompositions(decompositions([torch.ops.aten.lstm.input]))


def _rename(graph: Any, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    taken = set(graph.initializers)
    for argument, values, names in (
        ("input_names", graph.inputs, input_names),
        ("output_names", graph.outputs, output_names),
    ):
        if names is not None:
            if isinstance(names, str) or len(names) != len(values) or len({*names} - taken) != len(names):
                raise ValueError(
                    f"{argument} has to be {len(values)} different names that no weight has and no other argument "
                    f"gives, for {', '.join(value.name for value in values)}; got {names!r}"
                )
            for value, name in zip(values, names, strict=True):
                value.name = name
        taken.update(value.name for value in values)


def _finish(program: Any, linear: LinearAs) -> frozenset[str]:
    """Rewrite and optimize a program; the names of the weights that it holds transposed."""
    import onnx_ir

    from openwork.export.linear import write_linear_layers

    names = [value.name for value in (*program.model.graph.inputs, *program.model.graph.outputs)]
    transposed = write_linear_layers(program.model.graph, linear)
    program.optimize()
    assert names == [value.name for value in (*program.model.graph.inputs, *program.model.graph.outputs)]
    # The exporter notes the path and line of the user's code at every node: larger files, and private.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    return transposed


def _kept(model: Any, recorded: Mapping[str, Placed], transposed: Collection[str]) -> dict[str, Pattern]:
    """What was recorded of weights that are multiplied under their name, along their axis; a warning names others."""
    multiplied = {(matmul.name, matmul.axis) for matmul, _ in constant_matmuls(model)}
    kept = {
        name: pattern
        for name, (pattern, axis) in recorded.items()
        if (name, replace(axis, dim=1 - axis.dim) if name in transposed else axis) in multiplied
    }
    if lost := [name for name in recorded if name not in kept]:
        warnings.warn(
            f"the exporter rewrote {', '.join(lost[:3])} ({len(lost)} in all), so the file records nothing of them; "
            "openwork verify shows what they became, marked (inferred)",
            stacklevel=outside(),
        )
    return kept


@contextmanager
def _deleted_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _delete_former_weights(target: Path, own: Path) -> None:
    """Delete what held the weights of former files of the name. Each has a name of its own, and goes when no file
    speaks of it any more: so at every moment the file at `target` finds its weights."""
    former = re.compile(re.escape(target.name) + r"\.[0-9a-f]{8}\.data")
    for file in target.parent.iterdir():
        if former.fullmatch(file.name) and file != own:
            file.unlink(missing_ok=True)


def _save(model: Any, part: Path, data: Path) -> None:
    import onnx_ir

    size = sum(weight.const_value.nbytes for weight in model.graph.initializers.values())
    onnx_ir.save(model, part, external_data=data.name if size > _PROTOBUF_LIMIT else None)
    if data.exists():
        sync(data)


def _compare(path: Path, model: nn.Module, example: Any, operators: Operators, allowed: float) -> float | None:
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if operators == "openwork":
            options.register_custom_ops_library(onnxruntime_library())
    except (ImportError, RuntimeError) as error:  # the latter of a library that was not built
        reason = "onnxruntime is not installed" if isinstance(error, ImportError) else str(error)
        warnings.warn(f"{reason}: the outputs of the file were not compared", stacklevel=outside())
        return None
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    args, kwargs = arguments(model, example)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    needed = [value.name for value in session.get_inputs()]
    if len(given) != len(needed):
        raise RuntimeError(
            f"the example has {counted(len(given), 'tensor')}, the file takes {len(needed)}: {', '.join(needed)}"
        )
    feed = {name: _for_onnx(tensor) for name, tensor in zip(needed, given, strict=True)}
    results = [torch.from_numpy(np.asarray(array)) for array in session.run(None, feed)]
    return check_equal("ONNX Runtime", results, outputs(model, example), allowed)


def _for_onnx(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
