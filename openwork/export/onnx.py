"""ONNX: what ONNX Runtime, OpenVINO and TensorRT load. The zeros lie in constant weights of `Gemm` and `Conv`."""

from __future__ import annotations

import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openwork.export.check import KEY, MatMul, as_metadata, check_onnx, constant_matmuls
from openwork.export.outputs import arguments, check_equal, folded, outputs
from openwork.files.model_state import Placed, masked_by_name, patterns
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import unwrap
from openwork.training.selection import PatternChoice, Selection
from openwork.utils.atomic import atomic_file, sync
from openwork.utils.deployed import check_not_deployed
from openwork.utils.example import quiet
from openwork.utils.torch_private import tree_leaves

_PROTOBUF_LIMIT = 2_000_000_000  # bytes; weights of larger models lie in a second file


@dataclass(frozen=True)
class Exported:
    """What was written. `matmuls`: each matmul and convolution by a constant weight. `difference`: the largest
    difference of ONNX Runtime's outputs to the model's, as a share of the largest output; None where onnxruntime is not
    installed."""

    matmuls: tuple[MatMul, ...]
    difference: float | None


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    pattern: Selection | PatternChoice | None = None,
    dynamic_shapes: Any = None,
) -> Exported:
    """Write a model as ONNX, and check the file before it gets its name: the ONNX checker, N:M along the axis that
    each matmul sums over, and ONNX Runtime's outputs for `example`.

    `example` is a tensor, a tuple of arguments or a mapping of keyword arguments. A model that is still sparsified is
    exported as finalized; a plain one is held to `pattern` as in `ow.save`.
    `dynamic_shapes` as in torch.export.export: without it the file takes inputs of the example's shape alone. Weights
    of more than 2 GB, which one file cannot hold, go to a second one in the folder, `path`.<8 hexadecimal digits>.data.
    Raises NotSparse, ValueError from the checker, RuntimeError for other outputs, and what torch.onnx.export raises.
    """
    inner = unwrap(model)
    check_not_deployed(inner, "exporting to ONNX")
    recorded = patterns(inner, masked_by_name(inner), pattern)
    plain, renamed = folded(model)
    recorded = {renamed.get(name, name): placed for name, placed in recorded.items()}
    with quiet(plain):
        exported = _program(plain, example, dynamic_shapes)
    exported.model.metadata_props[KEY] = as_metadata(_kept(exported.model, recorded))
    target = Path(os.path.realpath(path))
    data = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
    with atomic_file(target, ".part.onnx") as part, _deleted_on_error(data):
        _save(exported.model, part, data)
        matmuls = check_onnx(part)
        difference = _compare(part, plain, example)
    _delete_former_weights(target, data)
    return Exported(matmuls, difference)


def _program(model: nn.Module, example: Any, dynamic_shapes: Any) -> Any:
    import onnx_ir

    from openwork.export.gemm import matmuls_to_gemms

    args, kwargs = arguments(model, example)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, about its own pytree
        program: Any = torch.onnx.export(
            model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=dynamic_shapes, optimize=False, verbose=False
        )
    matmuls_to_gemms(program.model.graph)
    program.optimize()
    # The exporter notes the path and line of the user's code at every node: larger files, and private.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    return program


def _kept(model: Any, recorded: Mapping[str, Placed]) -> dict[str, Pattern]:
    """What was recorded of weights that are multiplied under their name, along their axis; a warning names others."""
    multiplied = {(matmul.name, matmul.axis) for matmul, _ in constant_matmuls(model)}
    kept = {name: pattern for name, (pattern, axis) in recorded.items() if (name, axis) in multiplied}
    if lost := [name for name in recorded if name not in kept]:
        warnings.warn(
            f"the exporter rewrote {', '.join(lost[:3])} ({len(lost)} in all), so the file records nothing of them; "
            "openwork verify shows what they became, marked (inferred)",
            stacklevel=3,
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


def _compare(path: Path, model: nn.Module, example: Any) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        warnings.warn("onnxruntime is not installed: the outputs of the file were not compared", stacklevel=3)
        return None
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    args, kwargs = arguments(model, example)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    needed = [value.name for value in session.get_inputs()]
    if len(given) != len(needed):
        raise RuntimeError(f"the example has {len(given)} tensors, the file takes {len(needed)}: {', '.join(needed)}")
    feed = {name: _for_onnx(tensor) for name, tensor in zip(needed, given, strict=True)}
    results = [torch.from_numpy(np.asarray(array)) for array in session.run(None, feed)]
    return check_equal("ONNX Runtime", results, outputs(model, example))


def _for_onnx(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
