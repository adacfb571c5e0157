"""Measure, on this machine, what each sparse layer costs dense and sparse. Nothing is assumed faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from openwork.inference import gpu_layers
from openwork.inference.fold import as_it_was_made
from openwork.inference.layers import (
    GpuKind,
    Kind,
    PackedLayer,
    SparseConv2d,
    SparseLinear,
    kinds_for,
    symmetric_padding,
)
from openwork.kernels.cpu.onednn import prepacked_linear
from openwork.kernels.cuda import cusparselt
from openwork.kernels.cuda.cusparselt import Algorithm
from openwork.layouts.layout import conv_rows
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group
from openwork.nm.pattern import Pattern
from openwork.utils.example import run
from openwork.utils.table import aligned
from openwork.utils.timing import clock

_CPU = torch.device("cpu")

MARGIN = 0.97
"""A sparse layer is chosen where it takes less than this share of the dense time: below, it may be noise."""


@dataclass(frozen=True)
class Layer:
    """One weight of a plan. Times in seconds for one forward of the example, all calls of the layer; `dense` is the
    best of those measured, named by `dense_by`; `kind` is the kernel chosen, None where the layer stays dense, and
    `reason` says why."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    inputs: tuple[tuple[int, ...], ...] = ()
    dense: float = 0.0
    dense_by: str = ""
    sparse: float = 0.0
    kind: Kind | GpuKind | None = None
    reason: str = ""
    algorithms: Mapping[int, Algorithm] = field(default_factory=dict)
    """Of a layer on a GPU: by rows of input, the algorithm that it was timed with."""

    @property
    def ratio(self) -> float:
        """Dense time over sparse time: above 1 where sparse is faster."""
        return self.dense / self.sparse if self.sparse else 0.0


@dataclass(frozen=True)
class Plan:
    """What `plan` measured, layer by layer. `str()` is a table. Only `deploy` measures the rest: `whole` are the times
    of whole models in seconds, `returned` names the one that it returned, and `difference` is how far its outputs are
    from those of the model it got, on the example: the largest difference over the largest magnitude."""

    layers: tuple[Layer, ...]
    weight_dtype: torch.dtype
    machine: str
    whole: Mapping[str, float] = field(default_factory=dict)
    difference: float | None = None
    returned: str = ""

    @property
    def chosen(self) -> dict[str, Kind | GpuKind]:
        """The kernel of each weight that runs sparse: of none where the dense model was returned."""
        dense = self.returned.startswith("dense")
        return {each.name: each.kind for each in self.layers if each.kind and not dense}

    def __str__(self) -> str:
        header = ["weight", "shape", "pattern", "inputs", "dense us", "by", "sparse us", "ratio", "choice", "reason"]
        lines = [_cells(each) for each in self.layers]
        whole = [f"whole model, {name}: {seconds * 1e3:.2f} ms" for name, seconds in self.whole.items()]
        whole += [f"returned: {self.returned}"] if self.returned else []
        summary = f"{len(self.chosen)} of {len(self.layers)} weights run sparse, stored in {self.weight_dtype}"
        if self.difference is not None:
            whole.append(f"outputs differ from the given model's by {self.difference:.1g} of the largest")
        return "\n".join([self.machine, *aligned(header, lines), summary, *whole])


def machine(device: torch.device = _CPU) -> str:
    """What the times of a plan belong to."""
    import openwork.kernels as kernels

    if on_gpu(device):
        warned = cusparselt.version_warning(device)
        return cusparselt.machine(device) + (f" ({warned})" if warned else "")
    return f"{torch.get_num_threads()} threads, torch {torch.__version__}, {kernels.status()}"


def on_gpu(device: torch.device) -> bool:
    """Whether layers there take the kernels of a GPU."""
    return device.type == "cuda"


def measure_layers(
    model: nn.Module,
    example: Any,
    patterns: Mapping[str, Pattern | str],
    weight_dtype: torch.dtype,
    *,
    formats: bool = True,
) -> tuple[Layer, ...]:
    """Time every layer of a plain model in eval mode on the inputs that `example` brings it. `patterns`: weight name ->
    its pattern, or the reason why it has none. `formats`: sparse convolutions, like dense ones, count in the better
    memory format, since the whole model will be tried in both."""
    seen = _inputs(model, example)
    times: dict[Any, Layer] = {}
    layers = []
    for name, pattern in patterns.items():
        module_name, _, tensor = name.rpartition(".")
        module, inputs = model.get_submodule(module_name), seen.get(module_name, [])
        weight = getattr(module, tensor)
        shape = tuple(weight.shape)
        reason = pattern if isinstance(pattern, str) else cannot(module, tensor, pattern, weight_dtype, inputs)
        if reason or not isinstance(pattern, Pattern):
            layers.append(Layer(name, shape, None if isinstance(pattern, str) else pattern, reason=reason))
            continue
        kinds = tuple(gpu_kinds(module, pattern, weight_dtype, inputs)) if on_gpu(weight.device) else ()
        calls = tuple((tuple(x.shape), x.stride()) for x in inputs)
        alike = (repr(module), shape, weight.dtype, pattern, kinds, calls)
        if alike not in times:
            times[alike] = _timed(module, pattern, inputs, weight_dtype, formats)
        layers.append(replace(times[alike], name=name, shape=shape))
    return tuple(layers)


def cannot(
    module: nn.Module, tensor: str, pattern: Pattern, weight_dtype: torch.dtype, inputs: Sequence[Tensor]
) -> str:
    """Why there is no kernel for a weight; empty where there is one."""
    if tensor != "weight" or not has_kernel(module):
        return f"no kernel for {type(module).__name__}.{tensor}"
    if not as_it_was_made(module):
        return "it has hooks, or a forward of its own, which no kernel runs"
    weight: Any = module.weight
    gpu = on_gpu(weight.device)
    if not gpu and (weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16)):
        return f"{weight.dtype} on {weight.device}: kernels are for float32 and bfloat16 on a CPU, and for NVIDIA GPUs"
    if pattern.n == pattern.m:
        return "the pattern is dense"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        try:
            symmetric_padding(module)
        except ValueError as error:
            return str(error)
        if gpu and module.groups > 1:
            return f"a convolution in {module.groups} groups: sparse tensor cores multiply one matrix"
    if int(kept_per_group(_rows(module, pattern), pattern, Axis(1)).max()) > pattern.n:
        return "its groups run along another axis than products sum over"
    if weight_dtype == torch.int8 and not weight.isfinite().all():
        return "its weight holds numbers that are not finite, which int8 cannot"
    if not inputs:
        return "the example does not reach it"
    others = {str(x.dtype if _plain(x) else x.layout) for x in inputs} - {str(weight.dtype)}
    if others:
        return f"its inputs are {', '.join(sorted(others))}, its weight {weight.dtype}"
    return (
        ""
        if not gpu or gpu_kinds(module, pattern, weight_dtype, inputs)
        else _why_not(module, pattern, weight_dtype, inputs)
    )


def gpu_kinds(module: Any, pattern: Pattern, weight_dtype: torch.dtype, inputs: Sequence[Tensor]) -> list[GpuKind]:
    """The kernels of the GPU that can take a layer."""
    return [kind for kind, reason in _gpu_reasons(module, pattern, weight_dtype, inputs).items() if not reason]


def _gpu_reasons(
    module: Any, pattern: Pattern, weight_dtype: torch.dtype, inputs: Sequence[Tensor]
) -> dict[GpuKind, str]:
    rows = max((x.numel() // x.shape[-1] for x in inputs), default=0)
    transposed = _is_hf_conv1d(module)
    kinds = get_args(GpuKind)
    return {kind: gpu_layers.cannot(module, pattern, kind, weight_dtype, rows, transposed=transposed) for kind in kinds}


def _why_not(module: Any, pattern: Pattern, weight_dtype: torch.dtype, inputs: Sequence[Tensor]) -> str:
    return "; ".join(dict.fromkeys(_gpu_reasons(module, pattern, weight_dtype, inputs).values()))


def _plain(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def _rows(module: Any, pattern: Pattern) -> Tensor:
    """A layer's weight as that of a product: (O, K)."""
    weight: Tensor = module.weight
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return conv_rows(weight.unsqueeze(2) if weight.ndim == 3 else weight, pattern)
    return weight.t() if _is_hf_conv1d(module) else weight


def has_kernel(module: nn.Module) -> bool:
    """Whether there are kernels for the weight of a module of this class."""
    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) or _is_hf_conv1d(module)


def sparse_module(module: Any, pattern: Pattern, kind: Any, weight_dtype: torch.dtype) -> PackedLayer:
    """What stands in for a layer."""
    if kind in get_args(GpuKind):
        return gpu_layers.gpu_module(module, pattern, kind, weight_dtype, transposed=_is_hf_conv1d(module))
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return SparseConv2d(module, pattern, kind, weight_dtype)
    return SparseLinear(module, pattern, kind, weight_dtype, transposed=_is_hf_conv1d(module))


def _timed(
    module: nn.Module, pattern: Pattern, inputs: list[Tensor], weight_dtype: torch.dtype, formats: bool
) -> Layer:
    weight: Any = module.weight
    oriented = weight.t() if _is_hf_conv1d(module) else weight
    gpu = on_gpu(weight.device)
    kinds: Sequence[str] = (
        gpu_kinds(module, pattern, weight_dtype, inputs)
        if gpu
        else kinds_for(oriented, pattern, weight_dtype, getattr(module, "groups", 1))
    )
    measured: Counter[str] = Counter()
    shapes = Counter(tuple(x.shape) for x in inputs)
    examples = [next(x for x in inputs if tuple(x.shape) == shape) for shape in shapes]
    made, failed = _made(module, pattern, kinds, weight_dtype, examples)
    totals: Counter[str] = Counter()
    for x, calls in zip(examples, shapes.values(), strict=True):
        variants: dict[str, Callable[[], object]] = dict(_dense_variants(module, oriented, x))
        variants |= {kind: _call(each, x) for kind, each in made.items()}
        if formats and "dots" in made and weight.ndim == x.ndim == 4:
            variants["dots, channels_last"] = _call(made["dots"], x.to(memory_format=torch.channels_last))
        for name, seconds in clock(weight.device)(variants).items():
            totals[name] += seconds * calls  # type: ignore[assignment]
            measured[name] += 1
    if "dots, channels_last" in totals:
        totals["dots"] = min(totals["dots"], totals.pop("dots, channels_last"))
    everywhere = [name for name in totals if measured[name] == len(shapes)]
    dense_by = min((name for name in everywhere if name not in made), key=lambda name: totals[name])
    if not made:
        return Layer("", (), pattern, tuple(shapes), float(totals[dense_by]), dense_by, reason=failed)
    kind: Any = min(made, key=lambda name: totals[name])
    dense, sparse = float(totals[dense_by]), float(totals[kind])
    wins = sparse < MARGIN * dense
    return Layer(
        "",
        (),
        pattern,
        tuple(shapes),
        dense,
        dense_by,
        sparse,
        kind if wins else None,
        "" if wins else "dense is faster",
        dict(getattr(made[kind], "algorithms", {})),
    )


def _made(
    module: nn.Module, pattern: Pattern, kinds: Sequence[str], weight_dtype: torch.dtype, examples: Sequence[Tensor]
) -> tuple[dict[str, PackedLayer], str]:
    """The layer by each kind, ready to run, and why others are not: torch's private operators may refuse."""
    made: dict[str, PackedLayer] = {}
    failed: list[str] = []
    for kind in kinds:
        layer = _tried(module, pattern, kind, weight_dtype, examples)
        if isinstance(layer, str):
            failed.append(f"{kind}: {layer}")
        else:
            made[kind] = layer
    return made, "; ".join(failed)


def _tried(
    module: nn.Module, pattern: Pattern, kind: str, weight_dtype: torch.dtype, examples: Sequence[Tensor]
) -> PackedLayer | str:
    """The layer by one kind, or the error of the GPU's libraries."""
    if kind not in get_args(GpuKind):
        return sparse_module(module, pattern, kind, weight_dtype)
    try:
        layer: Any = sparse_module(module, pattern, kind, weight_dtype)
        for x in examples:
            layer.search(x)
            layer(x)
    except Exception as error:  # Triton's are of many kinds
        return " ".join(str(error).split())[:160]
    return layer


def _dense_variants(module: nn.Module, weight: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    variants: dict[str, Callable[[], object]] = {"torch": _call(module, x)}
    if weight.ndim == 2 and weight.device.type == "cpu":
        flat = x.reshape(-1, x.shape[-1])
        prepacked = prepacked_linear(weight.detach(), getattr(module, "bias", None), len(flat))
        if prepacked is not None and x.dtype == weight.dtype:
            variants["oneDNN prepacked"] = _call(prepacked, flat)
    elif weight.ndim == 4 and x.ndim == 4:
        other = nn.Conv2d.__new__(nn.Conv2d)
        other.__dict__.update(module.__dict__)
        other._parameters = {**module._parameters}
        other._parameters["weight"] = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
        variants["channels_last"] = _call(other, x.to(memory_format=torch.channels_last))
    return variants


def _call(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: function(x)


def _inputs(model: nn.Module, example: Any) -> dict[str, list[Tensor]]:
    """What each layer is called with, by its name."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            x = (*arguments, *keywords.values())[0]
            alike = [each for each in seen.setdefault(name, []) if _plain(x) and _plain(each) and _alike(each, x)]
            seen[name].append(alike[0] if alike else x.detach())  # one of each kind is held

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if has_kernel(module)
    ]
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype


def _is_hf_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _cells(each: Layer) -> list[str]:
    inputs = " ".join("x".join(map(str, shape)) for shape in each.inputs)
    times = [f"{each.dense * 1e6:.0f}", each.dense_by, f"{each.sparse * 1e6:.0f}", f"{each.ratio:.2f}"]
    cells = [each.name, "x".join(map(str, each.shape)), str(each.pattern or "-"), inputs]
    return [*cells, *(times if each.inputs else ["-"] * 4), each.kind or "dense", each.reason]
