"""Measure, on this machine, what each layer costs, dense and by every kernel that takes it. Nothing is assumed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import openwork.kernels as kernels
from openwork.inference.fold import as_it_was_made
from openwork.inference.geometry import form_of, is_known
from openwork.inference.layers import Packed as Packed
from openwork.inference.layers import pack_layer
from openwork.inference.plan import LayerTiming
from openwork.kernels.cpu.counts import too_dense
from openwork.kernels.cpu.onednn import prepacked_linear
from openwork.layouts.layout import KernelRefused, Kind, Request, kinds_on, refusal_of
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.utils.example import run
from openwork.utils.timing import MARGIN, clock

_LAST = ", channels_last"


def measure_layers(
    model: nn.Module,
    example: Any,
    patterns: Mapping[str, Pattern | str],
    weight_dtype: torch.dtype,
    *,
    formats: bool = True,
) -> Iterator[tuple[LayerTiming, Packed | None]]:
    """Time every layer of a plain model in eval mode on the inputs that `example` brings it, and give its timing, and
    the layer packed by the kernel that was chosen. Of equal layers the first alone is timed and packed.

    `patterns`: weight name -> its pattern, or the reason why it has none. `formats`: sparse convolutions, like dense
    ones, count in the better memory format, since the whole model will be tried in both."""
    inputs = inputs_of(model, example)
    measured: dict[Any, LayerTiming] = {}
    for name, pattern in patterns.items():
        module_name, _, tensor_name = name.rpartition(".")
        module, calls = model.get_submodule(module_name), inputs.get(module_name, [])
        shape = tuple(getattr(module, tensor_name).shape)
        if isinstance(pattern, str):
            yield LayerTiming(name, shape, None, reason=pattern), None
            continue
        request = request_of(module, tensor_name, pattern, weight_dtype, calls)
        kinds, reason = ([], request) if isinstance(request, str) else accepting(request)
        if reason:
            yield LayerTiming(name, shape, pattern, reason=reason), None
            continue
        forms = tuple((tuple(x.shape), x.stride()) for x in calls)
        alike = (repr(module), shape, module.weight.dtype, pattern, tuple(kinds), forms)
        packed = None
        if alike not in measured:
            measured[alike], packed = _timed(module, pattern, kinds, weight_dtype, calls, formats)
        yield replace(measured[alike], name=name, shape=shape), packed


def request_of(
    module: Any,
    tensor_name: str,
    pattern: Pattern,
    weight_dtype: torch.dtype,
    inputs: Sequence[Tensor],
    *,
    dense: bool = False,
) -> Request | str:
    """What a layer asks of a kernel, or why no kernel is asked. `dense`: one that prunes nothing is, too."""
    if tensor_name != "weight" or not is_known(module):
        return f"no kernel for {type(module).__name__}.{tensor_name}"
    if not as_it_was_made(module):
        return "it has hooks, or a forward of its own, which no kernel runs"
    if pattern.is_dense and not dense:
        return "the pattern is dense"
    try:
        form = form_of(module, pattern)
    except ValueError as error:
        return str(error)
    weight: Tensor = module.weight
    if too_dense(form.to_rows(weight), pattern, Axis(1)):
        return "its groups run along another axis than products sum over"
    if not inputs:
        return "the example does not reach it"
    others = {str(x.dtype if _is_plain(x) else x.layout) for x in inputs} - {str(weight.dtype)}
    if others:
        return f"its inputs are {', '.join(sorted(others))}, its weight {weight.dtype}"
    rows = max(x.numel() // x.shape[-1] for x in inputs)
    kept = weight.to(weight_dtype) if weight_dtype in (torch.float16, torch.bfloat16) else weight  # it may overflow
    finite = math.isfinite(sum(map(float, kept.aminmax())))  # one pass; NaN is both the least and the largest
    return Request(pattern, weight.dtype, weight_dtype, weight.device, kernels.vectors(), form.conv, rows, finite)


def accepting(request: Request) -> tuple[list[Kind], str]:
    """The kernels that take a layer, or why none does."""
    kinds = kinds_on(request.device.type)
    reasons = {kind: refusal_of(kind, request) for kind in kinds}
    takes = [kind for kind, reason in reasons.items() if not reason]
    if takes:
        return takes, ""
    return [], "; ".join(dict.fromkeys(reasons.values())) or f"no kernels for tensors on {request.device}"


def _timed(
    module: Any,
    pattern: Pattern,
    kinds: Sequence[Kind],
    weight_dtype: torch.dtype,
    inputs: Sequence[Tensor],
    formats: bool,
) -> tuple[LayerTiming, Packed | None]:
    """The timing of a layer, without its name, and the packed layer where that is faster than the dense one."""
    shapes = Counter(tuple(x.shape) for x in inputs)
    examples = [next(x for x in inputs if tuple(x.shape) == shape) for shape in shapes]
    layers, refused = _packed_by_each(module, pattern, kinds, weight_dtype, examples)
    dense, sparse = _totals(module, layers, examples, list(shapes.values()), formats)
    dense_by = min(dense, key=dense.__getitem__)
    timing = LayerTiming("", (), pattern, tuple(shapes), dense[dense_by], dense_by, reason=refused)
    if not layers:
        return timing, None
    kind = min(sparse, key=sparse.__getitem__)
    timing = replace(timing, sparse=sparse[kind], algorithms=dict(layers[kind].packed.algorithms), reason="")
    if sparse[kind] < MARGIN * dense[dense_by]:
        return replace(timing, kind=kind), layers[kind]
    return replace(timing, reason="dense is faster"), None


def _totals(
    module: Any, layers: Mapping[str, Packed], examples: Sequence[Tensor], calls: Sequence[int], formats: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all calls by each dense way and by each kernel, of those that ran on every example; of a kernel in the
    better memory format."""
    times: dict[str, list[float]] = {}
    for x, count in zip(examples, calls, strict=True):
        variants = dense_variants(module, x)
        for name, layer in layers.items():
            variants[name] = _call(layer, x)
            if formats and layer.packed.times_channels_last and x.ndim == module.weight.ndim == 4:
                variants[name + _LAST] = _call(layer, x.to(memory_format=torch.channels_last))
        for name, seconds in clock(module.weight.device)(variants).items():
            times.setdefault(name, []).append(seconds * count)
    totals = {name: sum(each) for name, each in times.items() if len(each) == len(examples)}
    sparse = {name: min(totals[name], totals.get(name + _LAST, totals[name])) for name in layers}
    return {name: total for name, total in totals.items() if name.removesuffix(_LAST) not in layers}, sparse


def _packed_by_each(
    module: Any, pattern: Pattern, kinds: Sequence[Kind], weight_dtype: torch.dtype, examples: Sequence[Tensor]
) -> tuple[dict[str, Packed], str]:
    """The layer by each kind, ready to run, and why it is not by others."""
    tried = {kind.name: _packed_by(kind, module, pattern, weight_dtype, examples) for kind in kinds}
    refused = [f"{name}: {reason}" for name, reason in tried.items() if isinstance(reason, str)]
    return {name: layer for name, layer in tried.items() if not isinstance(layer, str)}, "; ".join(refused)


def _packed_by(
    kind: Kind, module: Any, pattern: Pattern, weight_dtype: torch.dtype, examples: Sequence[Tensor]
) -> Packed | str:
    """The layer, its algorithms searched, or what its library says against it; any other error is one."""
    try:
        with torch.inference_mode(False):  # it may be loaded into later
            layer = pack_layer(module, pattern, kind, weight_dtype)
        for x in examples:
            layer.search(x)
            layer(x)
    except KernelRefused as error:
        return " ".join(str(error).split())[:160]
    return layer


def dense_variants(module: Any, x: Tensor) -> dict[str, Callable[[], object]]:
    variants: dict[str, Callable[[], object]] = {"torch": _call(module, x)}
    weight: Tensor = module.weight.detach()
    if weight.ndim == 2 and weight.device.type == "cpu":
        flat, oriented = x.reshape(-1, x.shape[-1]), form_of(module, Pattern(1, 1)).to_rows(weight)
        prepacked = prepacked_linear(oriented, getattr(module, "bias", None), len(flat))
        if prepacked is not None and x.dtype == weight.dtype:
            variants["oneDNN prepacked"] = _call(prepacked, flat)
    elif weight.ndim == 4 and x.ndim == 4:
        other = nn.Conv2d.__new__(nn.Conv2d)
        other.__dict__.update(module.__dict__)
        other._parameters = {**module._parameters}
        other._parameters["weight"] = nn.Parameter(weight.to(memory_format=torch.channels_last))
        variants["channels_last"] = _call(other, x.to(memory_format=torch.channels_last))
    return variants


def _call(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: function(x)


def inputs_of(model: nn.Module, example: Any) -> dict[str, list[Tensor]]:
    """What each layer is called with, by its name."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            x = (*arguments, *keywords.values())[0]
            alike = [y for y in seen.setdefault(name, []) if _is_plain(x) and _is_plain(y) and _alike(y, x)]
            seen[name].append(alike[0] if alike else x.detach())  # one of each kind is held

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if is_known(module)
    ]
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _is_plain(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype
