"""Run a sparse model faster than dense where that is possible on this machine, and dense where it is not."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from openwork.candidates import AxisChoice, PatternChoice
from openwork.folding import fold_batch_norm, following_relu
from openwork.gemms import run
from openwork.parametrization import unwrap
from openwork.pattern import Pattern
from openwork.planning import (
    MARGIN,
    Plan,
    as_graph,
    fastest,
    finished,
    machine,
    measure_layers,
    on_gpu,
    sparse_module,
)
from openwork.promise import promises
from openwork.semistructured import QUANTIZED
from openwork.sparsify import finalize
from openwork.verify import verify

STORED = (torch.float32, torch.bfloat16, torch.int8)
STORED_ON_GPU = (torch.float16, torch.bfloat16, *QUANTIZED)


def plan(
    model: nn.Module,
    example: Any,
    *,
    pattern: PatternChoice | None = None,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    stored: torch.dtype | None = None,
) -> Plan:
    """Time every sparse layer on the shapes that `example` brings it, dense (the best of torch's default, oneDNN
    prepacked, channels_last) and sparse, and say what `deploy` would choose. The model is not changed.

    `example` is a tensor, a tuple of arguments or a mapping of keyword arguments. `pattern`, `exclude` and `axis` as in
    `verify`. `stored` is the dtype that sparse kernels keep weights in. On a CPU it is float32, or bfloat16 or int8,
    which are smaller, and round. On a GPU it is the model's own dtype, or float16, bfloat16, int8, float8_e4m3fn.
    """
    ready, kept_in = _ready(model, example, pattern, exclude, axis, stored)
    with torch.inference_mode():
        return _plan(ready, example, kept_in)


def deploy(
    model: nn.Module,
    example: Any,
    *,
    pattern: PatternChoice | None = None,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    stored: torch.dtype | None = None,
    cuda_graph: bool = False,
) -> nn.Module:
    """A copy of the model for inference on the CPU or GPU that it is on, each layer dense or sparse, whichever was
    measured faster; arguments as in `plan`. Batch normalization is folded into the layers before it.

    The whole model is timed as well, against the same model all dense. If dense wins, the dense one is returned, and a
    warning says so. What was measured is in the result's `deployment`, a `Plan`. The result is saved, loaded, copied
    and pickled like the finalized model: its state dict has dense names and shapes. `cuda_graph` says that the caller
    will run it as a CUDA graph: then whole models are timed as graphs, without what launching costs.
    """
    dense, kept_in = _ready(model, example, pattern, exclude, axis, stored)
    with torch.inference_mode():
        found = _plan(dense, example, kept_in)
        sparse = copy.deepcopy(dense)
        _convert(sparse, found, example)
        whole = _whole(dense, sparse, example, bool(found.chosen), cuda_graph)
    found = dataclasses.replace(found, whole=whole)
    best = min(whole, key=lambda name: whole[name])
    best_dense = min(seconds for name, seconds in whole.items() if name.startswith("dense"))
    if best.startswith("dense") or whole[best] > MARGIN * best_dense:
        warnings.warn(f"sparse is not faster than dense here: the dense model is returned\n{found}", stacklevel=2)
        best, sparse = min((n for n in whole if n.startswith("dense")), key=lambda name: whole[name]), dense
    if best.endswith("channels_last"):
        sparse = _channels_last(sparse)
    sparse.deployment = found  # type: ignore[assignment]
    return sparse


def _ready(
    model: nn.Module,
    example: Any,
    pattern: PatternChoice | None,
    exclude: Sequence[str],
    axis: AxisChoice,
    stored: torch.dtype | None,
) -> tuple[nn.Module, torch.dtype]:
    """A plain copy in eval mode, batch normalization folded, that knows which patterns its weights hold; and the dtype
    that its weights will be stored in."""
    inner = unwrap(model)
    tensors = [*inner.parameters(), *inner.buffers()]
    where = {each.device for each in tensors}
    if len(where) > 1 or any(each.type not in ("cpu", "cuda") for each in where):
        found = ", ".join(sorted(map(str, where)))
        raise ValueError(f"the model is on {found}; needed one CPU or one GPU: model.to('cuda') or model.to('cpu')")
    gpu = any(on_gpu(each) for each in where)
    floats = [each.dtype for each in tensors if each.ndim > 1 and each.is_floating_point()]
    kept_in = stored or (floats[0] if gpu and floats else torch.float32)
    allowed = STORED_ON_GPU if gpu else STORED
    if stored is not None and stored not in allowed:
        raise ValueError(f"stored={stored}; needed one of {', '.join(map(str, allowed))}")
    report = verify(inner, pattern=pattern, exclude=exclude, axis=axis)
    ready = copy.deepcopy(inner)
    ready = (finalize(ready) if promises(ready) else ready).eval().requires_grad_(False)
    fold_batch_norm(ready, example)
    rows = {row.name: row.pattern or row.reason for row in report.rows}
    ready.__dict__["_openwork_patterns"] = rows
    return ready, kept_in


def _plan(ready: nn.Module, example: Any, stored: torch.dtype) -> Plan:
    patterns: dict[str, Pattern | str] = ready.__dict__["_openwork_patterns"]
    return Plan(measure_layers(ready, example, patterns, stored), stored, machine(_device(ready)), {})


def _device(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _convert(model: nn.Module, found: Plan, example: Any) -> None:
    """Put sparse layers where the plan chose them, and take ReLUs into them that nothing else uses."""
    followed = following_relu(model, example)
    for layer in found.layers:
        if layer.kind is None or layer.pattern is None:
            continue
        name = layer.name.rpartition(".")[0]
        parent, _, child = name.rpartition(".")
        made = sparse_module(model.get_submodule(name), layer.pattern, layer.kind, found.stored)
        if name in followed:
            made.relu = True  # type: ignore[assignment]
            above, _, relu = followed[name].rpartition(".")
            setattr(model.get_submodule(above), relu, nn.Identity())
        setattr(model.get_submodule(parent), child, made)


def _whole(dense: nn.Module, sparse: nn.Module, example: Any, differ: bool, graph: bool) -> dict[str, float]:
    """Median seconds of one forward of whole models; images also in channels_last."""
    variants: dict[str, Callable[[], object]] = {"dense": _forward(dense, example)}
    if differ:
        variants["sparse"] = _forward(sparse, example)
    if any(isinstance(module, nn.Conv2d) for module in dense.modules()):
        variants["dense, channels_last"] = _forward(_channels_last(copy.deepcopy(dense)), example)
        if differ:
            variants["sparse, channels_last"] = _forward(_channels_last(copy.deepcopy(sparse)), example)
    device = _device(dense)
    if graph and device.type != "cuda":
        raise ValueError(f"cuda_graph=True for a model on {device}; needed one on a GPU: model.to('cuda')")
    if device.type == "cuda":
        variants = {name: finished(as_graph(each) if graph else each) for name, each in variants.items()}
    return fastest(variants, seconds=1.0)


def _channels_last(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    return model


def _forward(model: nn.Module, example: Any) -> Callable[[], object]:
    return lambda: run(model, example)
