"""Run a sparse model faster than dense where that is possible on this machine, and dense where it is not."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from openwork.inference.choose import (
    MARGIN,
    Plan,
    machine,
    measure_layers,
    on_gpu,
    sparse_module,
)
from openwork.inference.fold import fold_batch_norm, following_relu, replace
from openwork.inference.layers import PackedLayer, SparseConv2d
from openwork.kernels.cuda.stream import on_device
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import QUANTIZED
from openwork.training.parametrize import unwrap
from openwork.training.record import sparsity_records
from openwork.training.select import PatternChoice, Selection
from openwork.training.sparsify import finalize
from openwork.training.verify import verify
from openwork.utils.example import run
from openwork.utils.timing import as_graph, compile_frozen, fastest, finished

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
WEIGHT_DTYPES_ON_GPU = (torch.float16, torch.bfloat16, *QUANTIZED)


def plan(
    model: nn.Module,
    example: Any,
    *,
    pattern: Selection | PatternChoice | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Plan:
    """Time every sparse layer on the shapes that `example` brings it, dense (the best of torch's default, oneDNN
    prepacked, channels_last) and sparse, and say what `deploy` would choose. The model is not changed.

    `example` is a tensor, a tuple of arguments or a mapping of keyword arguments. `pattern` as in `verify`.
    `weight_dtype` is the dtype that sparse kernels keep weights in, by default the model's own. On a CPU float32, or
    bfloat16 or int8, which are smaller, and round. On a GPU the model's own dtype, or float16, bfloat16, int8,
    float8_e4m3fn.
    """
    with torch.inference_mode(False), on_device(_device(unwrap(model))):
        ready, patterns, weight_dtype = _ready(model, pattern, weight_dtype)
        fold_batch_norm(ready, example)
        return _plan(ready, example, patterns, weight_dtype)


def deploy(
    model: nn.Module,
    example: Any,
    *,
    pattern: Selection | PatternChoice | None = None,
    weight_dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    compiled: bool = False,
) -> nn.Module:
    """A copy of the model for inference on the CPU or GPU that it is on, each layer dense or sparse, whichever was
    measured faster; arguments as in `plan`. Batch normalization is folded into the layers before it.

    The whole model is timed as well, against the same model all dense. If dense wins, the dense one is returned, and a
    warning says so. What was measured is in the result's `deployment`, a `Plan`, with how far outputs on the example
    are from the given model's; of more than rounding explains, a warning says so. The result is saved, loaded, copied
    and pickled like any model: its state dict has dense names and shapes, without normalizations that were folded.
    `cuda_graph` says that the caller will run it as a CUDA graph: then whole models are timed as graphs, without what
    launching costs. `compiled` says that the caller will hand it to `torch.compile`: then whole models are timed
    compiled, with frozen weights (`torch._inductor.config.freezing`, which helps dense products). That takes minutes
    for a large model, and on a CPU a C++ compiler.
    """
    # Not in inference mode, also where the caller is in it: what is made here can be loaded into later.
    with torch.inference_mode(False), on_device(_device(unwrap(model))):
        dense, patterns, weight_dtype = _ready(model, pattern, weight_dtype)
        expected = _outputs(dense, example)
        fold_batch_norm(dense, example)
        found = _plan(dense, example, patterns, weight_dtype)
        sparse = _converted(copy.deepcopy(dense), found, example)
        models = {"dense": dense, "sparse": sparse} if found.chosen else {"dense": dense}
        whole = _whole(models, example, cuda_graph, compiled)
        best = _winner(whole)
        result = dense if best.startswith("dense") else sparse
        result = _channels_last(result) if best.endswith("channels_last") else result
        difference = _difference(expected, _outputs(result, example))
    found = dataclasses.replace(found, whole=whole, difference=difference, returned=best)
    if result is dense:
        warnings.warn(f"sparse is not faster than dense here: the dense model is returned\n{found}", stacklevel=2)
    exact = weight_dtype == torch.float32 and all(each.dtype == torch.float32 and each.is_cpu for each in expected)
    if difference > (most := 1e-3 if exact else 0.1):  # rounding of float32 makes 1e-6 or so
        warnings.warn(
            f"outputs differ from the given model's by {difference:.1g} of the largest, more than {most:g}: check them "
            "before use. Is the model itself reproducible on this example?",
            stacklevel=2,
        )
    result.deployment = found  # type: ignore[assignment]
    return result


def _ready(
    model: nn.Module,
    pattern: Selection | PatternChoice | None,
    weight_dtype: torch.dtype | None,
) -> tuple[nn.Module, dict[str, Pattern | str], torch.dtype]:
    """A plain copy in eval mode; for each weight its pattern or why it has none; the dtype to store weights in."""
    inner = unwrap(model)
    tensors = [*inner.parameters(), *inner.buffers()]
    where = {each.device for each in tensors}
    if len(where) > 1 or any(each.type not in ("cpu", "cuda") for each in where):
        found = ", ".join(sorted(map(str, where)))
        raise ValueError(f"the model is on {found}; needed one CPU or one GPU: model.to('cuda') or model.to('cpu')")
    gpu = any(on_gpu(each) for each in where)
    allowed = WEIGHT_DTYPES_ON_GPU if gpu else WEIGHT_DTYPES
    if weight_dtype is not None and weight_dtype not in allowed:
        raise ValueError(f"weight_dtype={weight_dtype}; needed one of {', '.join(map(str, allowed))}")
    weight_dtype = weight_dtype or own_dtype(inner)
    report = verify(inner, pattern=pattern)
    ready = copy.deepcopy(inner)
    ready = (finalize(ready) if sparsity_records(ready) else ready).eval().requires_grad_(False)
    return ready, {row.name: row.pattern or row.reason for row in report.rows}, weight_dtype


def own_dtype(model: nn.Module) -> torch.dtype:
    """What weights are stored in where nobody says: on a GPU the dtype of the first; on a CPU bfloat16 where all are,
    else float32."""
    weights = [each for each in (*model.parameters(), *model.buffers()) if each.ndim > 1 and each.is_floating_point()]
    if any(on_gpu(each.device) for each in weights):
        return weights[0].dtype
    return torch.bfloat16 if {each.dtype for each in weights} == {torch.bfloat16} else torch.float32


def _plan(ready: nn.Module, example: Any, patterns: Mapping[str, Pattern | str], weight_dtype: torch.dtype) -> Plan:
    with torch.inference_mode():
        return Plan(measure_layers(ready, example, patterns, weight_dtype), weight_dtype, machine(_device(ready)))


def _device(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _converted(model: nn.Module, found: Plan, example: Any) -> nn.Module:
    """The model with sparse layers where the plan chose them, which take in the ReLUs that nothing else uses."""
    followed = following_relu(model, example) if found.chosen else {}
    for layer in found.layers:
        if layer.kind is None or layer.pattern is None:
            continue
        name = layer.name.rpartition(".")[0]
        dense = model.get_submodule(name)
        made: Any = sparse_module(dense, layer.pattern, layer.kind, found.weight_dtype)
        if layer.algorithms:
            made.algorithms = dict(layer.algorithms)
        if name in followed:
            made.relu = True
            replace(model, model.get_submodule(followed[name]), nn.Identity())
        if dense is model:
            return made
        replace(model, dense, made)
    for encoder in (each for each in model.modules() if isinstance(each, nn.TransformerEncoderLayer)):
        if any(isinstance(each, PackedLayer) for each in encoder.children()):
            encoder.activation_relu_or_gelu = 0  # torch's fused path would read the dense weights
    return model


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating tensors that the model returns, copied, with the random numbers of one seed."""
    gpus = {each.device.index for each in model.parameters() if each.is_cuda}
    with torch.random.fork_rng(devices=gpus), torch.inference_mode():
        torch.manual_seed(0)
        found = tree_leaves(run(model, example))
    return [each.clone() for each in found if isinstance(each, Tensor) and each.is_floating_point()]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference over the largest magnitude; infinite where the shapes differ, or what is not finite.

    >>> _difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
    0.25
    """
    if [each.shape for each in expected] != [each.shape for each in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max((_share(a, b) for a, b in pairs), default=0.0)


def _share(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    apart = torch.where(same, 0.0, (a - b).abs()).max()  # NaN where one is
    largest = torch.where(a.isfinite(), a.abs(), 0.0).max()
    return math.inf if apart.isnan() else float(apart / largest)


def _winner(whole: Mapping[str, float]) -> str:
    """The fastest; a sparse one only where it is faster than every dense one by more than noise.

    >>> _winner({"dense": 1.0, "sparse": 0.99}), _winner({"dense": 1.0, "sparse": 0.5})
    ('dense', 'sparse')
    """
    best = min(whole, key=lambda name: whole[name])
    dense = min((name for name in whole if name.startswith("dense")), key=lambda name: whole[name])
    return best if whole[best] < MARGIN * whole[dense] else dense


def _whole(models: Mapping[str, nn.Module], example: Any, graph: bool, compiled: bool) -> dict[str, float]:
    """Median seconds of one forward of whole models: compiled where the caller will compile them; else images also in
    channels_last."""
    device = _device(models["dense"])
    if graph and device.type != "cuda":
        raise ValueError(f"cuda_graph=True for a model on {device}; needed one on a GPU: model.to('cuda')")
    ready = dict(models)
    if compiled:
        ready = {f"{name}, compiled": compile_frozen(each, example) for name, each in models.items()}
    elif any(isinstance(module, nn.Conv2d) for module in models["dense"].modules()):
        ready |= {f"{name}, channels_last": _channels_last(copy.deepcopy(each)) for name, each in models.items()}
    variants = {name: _forward(each, example) for name, each in ready.items()}
    with torch.inference_mode():
        if device.type == "cuda":
            variants = {name: finished(as_graph(each) if graph else each) for name, each in variants.items()}
        return fastest(variants, seconds=1.0)


def _channels_last(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
        elif isinstance(module, SparseConv2d):
            module.channels_last = not module.flat
    return model


def _forward(model: nn.Module, example: Any) -> Callable[[], object]:
    return lambda: run(model, example)
