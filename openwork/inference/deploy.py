"""Run a sparse model faster than dense where that is possible on this machine, and dense where it is not."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openwork.inference.choose import Packed, measure_layers
from openwork.inference.compare import other_engines
from openwork.inference.fold import fold_batch_norm, following_relu, replace
from openwork.inference.int8_network import int8_network
from openwork.inference.layers import PackedConv2d, PackedLayer, pack_layer
from openwork.inference.plan import INT8_NETWORK, Plan, environment
from openwork.kernels.cpu.native import warn_without_library
from openwork.kernels.cuda.stream import on_device
from openwork.layouts.layout import kind_named, kinds_on
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import unwrap
from openwork.training.record import sparsity_records
from openwork.training.selection import PatternChoice, Selection
from openwork.training.sparsify import finalize
from openwork.training.verify import verify
from openwork.training.weight_norm import fold_weight_norm
from openwork.utils.caller import outside
from openwork.utils.copied import copied
from openwork.utils.difference import largest_difference
from openwork.utils.example import run
from openwork.utils.timing import MARGIN, as_graph, compile_frozen, fastest, finished
from openwork.utils.torch_private import tree_leaves

TimedAs = Literal["eager", "graph", "compiled"]


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

    >>> import torch, openwork as ow
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> _ = ow.project(model, "1:4")
    >>> [layer.name for layer in ow.plan(model, torch.randn(1, 64), pattern="1:4").layers]
    ['0.weight']
    """
    with torch.inference_mode(False), on_device(_device(unwrap(model))):
        ready, patterns, weight_dtype = inference_copy(model, pattern, weight_dtype)
        fold_batch_norm(ready, example)
        with torch.inference_mode():
            layers = tuple(timing for timing, _ in measure_layers(ready, example, patterns, weight_dtype))
        return Plan(layers, weight_dtype, environment(_device(ready)))


def deploy(
    model: nn.Module,
    example: Any,
    *,
    pattern: Selection | PatternChoice | None = None,
    weight_dtype: torch.dtype | None = None,
    calibrate: Iterable[Any] | None = None,
    timed_as: TimedAs = "eager",
    engine_seconds: float = 60.0,
) -> nn.Module:
    """A copy of the model for inference on the CPU or GPU that it is on, each layer dense or sparse, whichever was
    measured faster; arguments as in `plan`. Batch normalization is folded into the layers before it, weight
    normalization into its weight.

    The whole model is timed as well, against the same model all dense: in turns, until it is known which is faster or
    some 5 s for each are over; sparse has to take less than 0.97 of the dense time (docs/performance-details.md has the
    rule). If dense wins, the dense one is returned, and a warning says so. What was measured is in the result's
    `deployment`, a `Plan`, with how far outputs on the example are from the given model's; of more than rounding
    explains, a warning says so. The result is saved, loaded, copied and pickled like any model: its layers are of the
    classes they were, and its state dict is that of the model, with normalizations that do nothing where they were
    folded (docs/limits.md).
    `calibrate`: with `weight_dtype=torch.int8` on a CPU, examples like `example`, of real data. From them come static
    scales, with which activations stay int8 from layer to layer; requantization, bias, ReLU, GELU and the addition of
    residuals are part of the products. Layers that cost too much accuracy stay float32. It is one more model that is
    timed as a whole; a network that `torch.export` does not take has none, and a warning says so.
    `timed_as` says how the caller will run it, and whole models are timed so: "graph", as a CUDA graph, without what
    launching costs; "compiled", by `torch.compile` with frozen weights (`torch._inductor.config.freezing`, which helps
    dense products), which takes minutes for a large model, and on a CPU a C++ compiler.
    `engine_seconds`: on a CPU OpenVINO and ONNX Runtime, where they are installed, run the dense network as well, in a
    process of its own and for so many seconds at most; of one that is faster than what is returned, a warning says so.
    0 leaves that out (docs/deploy/cpu.md has the rule).

    >>> import torch, openwork as ow
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> _ = ow.project(model, "1:4")
    >>> fast = ow.deploy(model, torch.randn(1, 64), pattern="1:4", engine_seconds=0)
    >>> fast.deployment.difference < 1e-3
    True
    """
    # Not in inference mode, also where the caller is in it: what is made here can be loaded into later.
    with torch.inference_mode(False), on_device(_device(unwrap(model))):
        dense, patterns, weight_dtype = inference_copy(model, pattern, weight_dtype)
        _check_timed_as(timed_as, _device(dense))
        batches = checked_batches(calibrate, weight_dtype, _device(dense))
        expected = _outputs(dense, example)
        fold_batch_norm(dense, example)
        with torch.inference_mode():
            timings = tuple(measure_layers(dense, example, patterns, weight_dtype))
        measured = Plan(tuple(timing for timing, _ in timings), weight_dtype, environment(_device(dense)))
        sparse = _converted(copy.deepcopy(dense), measured, [packed for _, packed in timings], example)
        models = {"dense": dense, "sparse": sparse} if measured.chosen else {"dense": dense}
        whole_int8, network = int8_network(dense, example, patterns, batches) if batches else (None, None)
        if whole_int8 is not None:
            models[INT8_NETWORK] = whole_int8
        elif network is not None:
            warnings.warn(f"calibrate: no int8 network, layer by layer instead: {network.reason}", stacklevel=outside())
        whole, calls = _whole(models, example, timed_as)
        best = _winner(whole)
        fastest_call = calls.pop(best)
        calls.clear()  # and the copies that they hold
        result = models[best.partition(",")[0]]
        result = _channels_last(result) if best.endswith("channels_last") else result
        difference = largest_difference(expected, _outputs(result, example))
        engines = other_engines(dense, example, fastest_call, weight_dtype, engine_seconds, batches)
    measured = dataclasses.replace(measured, whole=whole, difference=difference, returned=best, engines=engines)
    measured = dataclasses.replace(measured, network=network)
    if engines and engines.faster:
        warnings.warn(f"{engines.faster} (see model.deployment)", stacklevel=outside())
    if result is dense:
        why = "sparse is not faster than dense here: the dense model is returned (see model.deployment)"
        warnings.warn(why, stacklevel=outside())
    exact = weight_dtype == torch.float32 and all(each.dtype == torch.float32 and each.is_cpu for each in expected)
    if difference > (most := 1e-3 if exact else 0.1):  # rounding of float32 makes 1e-6 or so
        warnings.warn(
            f"outputs differ from the given model's by {difference:.1g} of the largest, more than {most:g}: check them "
            "before use. Is the model itself reproducible on this example?",
            stacklevel=outside(),
        )
    result.deployment = measured  # type: ignore[assignment]
    return result


def inference_copy(
    model: nn.Module,
    pattern: Selection | PatternChoice | None,
    weight_dtype: torch.dtype | None,
) -> tuple[nn.Module, dict[str, Pattern | str], torch.dtype]:
    """A plain copy in eval mode; for each weight its pattern or why it has none; the dtype to store weights in."""
    inner = unwrap(model)
    devices = {each.device for each in (*inner.parameters(), *inner.buffers())}
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the model is on {where}; needed one CPU or one GPU: model.to('cuda') or model.to('cpu')")
    if _device(inner).type == "cpu":
        warn_without_library()
    check_weight_dtype(weight_dtype, _device(inner).type)
    weight_dtype = weight_dtype or own_dtype(inner)
    report = verify(inner, pattern=pattern)
    ready = copied(inner)
    ready = (finalize(ready) if sparsity_records(ready) else ready).eval().requires_grad_(False)
    renamed = fold_weight_norm(ready)
    names = {name for name, _ in ready.named_parameters(remove_duplicate=False)}  # lengths of directions are gone
    patterns = {renamed.get(row.name, row.name): row.pattern or row.reason for row in report.rows}
    return ready, {name: pattern for name, pattern in patterns.items() if name in names}, weight_dtype


def checked_batches(calibrate: Iterable[Any] | None, weight_dtype: torch.dtype, device: torch.device) -> list[Any]:
    """The batches to calibrate by. Raises ValueError where there is no use for them, or none."""
    if calibrate is None:
        return []
    if weight_dtype != torch.int8 or device.type != "cpu":
        found = f"weight_dtype={weight_dtype} on {device}"
        raise ValueError(f"calibrate with {found}; it is for weight_dtype=torch.int8 on a CPU")
    if isinstance(calibrate, Tensor | Mapping) or not (batches := list(calibrate)):
        raise ValueError("calibrate; needed a list of examples (or any iterable), each like `example`, at least one")
    return batches


def check_weight_dtype(weight_dtype: torch.dtype | None, device_type: str) -> None:
    """Raises ValueError where no kernel of a device keeps weights in a dtype."""
    allowed = dict.fromkeys(dtype for kind in kinds_on(device_type) for dtype in kind.weight_dtypes)
    if weight_dtype is not None and weight_dtype not in allowed:
        raise ValueError(f"weight_dtype={weight_dtype}; needed one of {', '.join(map(str, allowed))}")


def own_dtype(model: nn.Module) -> torch.dtype:
    """What weights are stored in where nobody says: on a GPU the dtype of the first; on a CPU bfloat16 where all are,
    else float32."""
    weights = [each for each in (*model.parameters(), *model.buffers()) if each.ndim > 1 and each.is_floating_point()]
    if any(each.is_cuda for each in weights):
        return weights[0].dtype
    return torch.bfloat16 if {each.dtype for each in weights} == {torch.bfloat16} else torch.float32


def _device(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _converted(model: nn.Module, plan: Plan, packed: list[Packed | None], example: Any) -> nn.Module:
    """The model with sparse layers where the plan chose them, which take in the ReLUs that nothing else uses."""
    followed = following_relu(model, example) if plan.chosen else {}
    for timing, layer in zip(plan.layers, packed, strict=True):
        if timing.kind is None or timing.pattern is None:
            continue
        name = timing.name.rpartition(".")[0]
        dense = model.get_submodule(name)
        if layer is None:  # equal to one that was timed
            layer = pack_layer(dense, timing.pattern, kind_named(timing.kind), plan.weight_dtype)
            layer.packed.algorithms = dict(timing.algorithms)
        if name in followed:
            layer.relu = True
            replace(model, model.get_submodule(followed[name]), nn.Identity())
        if dense is model:
            return layer
        replace(model, dense, layer)
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


def _winner(whole: Mapping[str, float]) -> str:
    """The fastest; a sparse one only where it is faster than every dense one by more than 3 %.

    >>> _winner({"dense": 1.0, "sparse": 0.99}), _winner({"dense": 1.0, "sparse": 0.5})
    ('dense', 'sparse')
    """
    best = min(whole, key=lambda name: whole[name])
    dense = min((name for name in whole if name.startswith("dense")), key=lambda name: whole[name])
    return best if whole[best] < MARGIN * whole[dense] else dense


def _check_timed_as(timed_as: str, device: torch.device) -> None:
    if timed_as not in get_args(TimedAs):
        raise ValueError(f"timed_as={timed_as!r}; needed one of {', '.join(map(repr, get_args(TimedAs)))}")
    if timed_as == "graph" and device.type != "cuda":
        raise ValueError(f"timed_as='graph' for a model on {device}; needed one on a GPU: model.to('cuda')")


def _whole(
    models: Mapping[str, nn.Module], example: Any, timed_as: str
) -> tuple[dict[str, float], dict[str, Callable[[], object]]]:
    """Seconds of one forward of whole models, and the calls: compiled where the caller will compile them; else
    images also in channels_last."""
    ready = dict(models)
    if timed_as == "compiled":
        ready = {f"{name}, compiled": compile_frozen(each, example) for name, each in models.items()}
    elif any(isinstance(module, nn.Conv2d) for module in models["dense"].modules()):
        both = {name: each for name, each in models.items() if name != INT8_NETWORK}  # that one has its own formats
        ready |= {f"{name}, channels_last": _channels_last(copy.deepcopy(each)) for name, each in both.items()}
    variants = {name: _forward(each, example) for name, each in ready.items()}
    with torch.inference_mode():
        if _device(models["dense"]).type == "cuda":
            graph = timed_as == "graph"
            variants = {name: finished(as_graph(each) if graph else each) for name, each in variants.items()}
        return fastest(variants, seconds=5.0), variants


def _channels_last(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
        elif isinstance(module, PackedConv2d):
            module.channels_last = True
    return model


def _forward(model: nn.Module, example: Any) -> Callable[[], object]:
    return lambda: run(model, example)
