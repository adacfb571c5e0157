"""From a compressed file to a deployed model, without the dense model in between: one dense weight at a time.

Layers that a kernel may take are *streamed*: they stand in the model without a weight, which is read from the file
when the layer is called or timed, and forgotten afterwards, until it is decided what the layer becomes.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import openwork.kernels as kernels
from openwork.files.container import Stored
from openwork.files.foreign.compressed_tensors import Bitmask
from openwork.files.format import Sparse
from openwork.files.hub import local
from openwork.files.model_state import check_same, tensors_by_name, ties
from openwork.files.reader import Contents, opened
from openwork.inference.choose import Packed, measure_layers
from openwork.inference.deploy import check_weight_dtype, own_dtype
from openwork.inference.fold import foldable, following_relu, fuse
from openwork.inference.fold import replace as replace_module
from openwork.inference.geometry import form_of, is_known
from openwork.inference.layers import PackedLayer, pack_layer
from openwork.inference.plan import LayerTiming, Plan, environment
from openwork.layouts.layout import Request, kind_named, kinds_on
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.training.known_layers import known_axis
from openwork.training.parametrize import masked_modules, unwrap
from openwork.training.record import sparsity_records
from openwork.utils.example import run

Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of an input."""


def load_deployed(
    path: str | os.PathLike[str],
    model: nn.Module,
    example: Any,
    *,
    chosen: Mapping[str, str] | None = None,
    weight_dtype: torch.dtype | None = None,
) -> nn.Module:
    """What `ow.deploy` makes of the model in a file, read layer by layer: memory holds the packed layers and one dense
    weight at a time, never the dense model. `path` as in `ow.load`, `weight_dtype` as in `ow.deploy`.

    `model` says which network it is and is not changed. It may have no weights: `with torch.device("meta"): model =
    network()`. Every layer is timed on the shapes that `example` brings it, or is what `chosen` says: names of weights
    with their kernels, the `deployment.chosen` of an earlier result, all others dense. The whole model is not compared
    with the dense one, which never exists here: `ow.deploy` does that. Where no layer is faster sparse, the result is
    dense, and a warning says so. Raises ValueError where file and model, or `chosen`, do not fit.
    """
    elsewhere = {str(x.device) for x in tree_leaves(example) if isinstance(x, Tensor) and x.device.type != "cpu"}
    if elsewhere:
        raise ValueError(
            f"load_deployed packs for the CPU, the example is on {', '.join(sorted(elsewhere))}: move it to the "
            "CPU, or ow.load the file into a model there and ow.deploy that"
        )
    weight_dtype = weight_dtype or own_dtype(model)
    check_weight_dtype(weight_dtype, "cpu")
    with local(path) as here, opened(here) as contents, torch.no_grad():
        streamed = _streamed(contents, model)
        with streamed.running():
            _fold(streamed, example)
            run(streamed.model, example)
        timings = []
        decided = _measured(streamed, weight_dtype) if chosen is None else _as_chosen(streamed, chosen, weight_dtype)
        for timing, packed in decided:
            _settle(streamed, timing, packed, weight_dtype)
            timings.append(timing)
        plan = Plan((*timings, *streamed.dense), weight_dtype, environment(torch.device("cpu")))
        for name, relu in following_relu(streamed.model, example).items():
            layer = streamed.model.get_submodule(name)
            if isinstance(layer, PackedLayer):
                layer.relu = True
                _put(streamed.model, relu, nn.Identity())
    if not plan.chosen:
        warnings.warn(f"no layer is faster sparse here: the model is dense\n{plan}", stacklevel=2)
    streamed.model.deployment = plan  # type: ignore[assignment]
    return streamed.model


@dataclass
class _Stream:
    """A layer whose weight is read when it is needed. `name` is that of the weight, `path` where the layer stands;
    `inputs` counts its calls by the form of the input."""

    name: str
    path: str
    pattern: Pattern
    read: Callable[[], Tensor]
    inputs: Counter[Form] = field(default_factory=Counter)

    @contextmanager
    def at_hand(self, layer: nn.Module) -> Iterator[None]:
        """The layer has its weight meanwhile."""
        empty = layer._parameters["weight"]
        layer._parameters["weight"] = _parameter(self.read())
        try:
            yield
        finally:
            layer._parameters["weight"] = empty


@dataclass(frozen=True)
class _Streamed:
    """A model that has everything but the weights of its streamed layers. `dense`: the weights of two dims or more that
    are not streamed, with the reason."""

    model: nn.Module
    layers: dict[Any, _Stream]
    dense: tuple[LayerTiming, ...]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model can be called meanwhile, and is watched."""
        handles = [handle for layer, stream in self.layers.items() for handle in _hooks(layer, stream)]
        try:
            yield
        finally:
            for each in handles:
                each.remove()


def _hooks(layer: nn.Module, stream: _Stream) -> tuple[Any, Any]:
    empty = layer._parameters["weight"]

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            x = arguments[0]
            stream.inputs[tuple(x.shape), x.stride(), x.dtype] += 1
        layer._parameters["weight"] = _parameter(stream.read())

    def after(*_: Any) -> None:
        layer._parameters["weight"] = empty

    return layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)


def _streamed(contents: Contents, model: nn.Module) -> _Streamed:
    """A copy of the model, filled from the file but for the layers that are streamed."""
    inner = unwrap(model)
    if sparsity_records(inner) or any(True for _ in masked_modules(inner)):
        raise ValueError("the model is sparsified, and a plain one is needed: build it anew, without sparsify")
    targets = tensors_by_name(inner, empty=True)
    check_same(contents, targets, ties(targets, {}))
    empty = {name: _without_values(each) for name, each in targets.items()}
    empty |= {alias: empty[name] for alias, name in ties(targets, {}).items()}
    memo = {id(each): empty[name] for name, each in targets.items()}
    ready: nn.Module = copy.deepcopy(inner, memo).eval().requires_grad_(False)
    places = _places(ready)
    layers: dict[Any, _Stream] = {}
    dense = []
    for name, each in contents.tensors.items():
        where = [place for tensor in {empty[alias] for alias in contents.names_of(name)} for place in places[tensor]]
        reason = _cannot_stream(each, where)
        if not reason and isinstance(each, Sparse | Bitmask):
            layers[where[0].module] = _Stream(name, where[0].path, each.pattern, partial(contents.read, name))
            continue
        if len(each.shape) > 1:
            pattern = None if isinstance(each, Stored) else each.pattern
            dense.append(LayerTiming(name, each.shape, pattern, reason=reason))
        _fill(where, contents.read(name))
    _check_values(ready, set(layers))
    return _Streamed(ready, layers, tuple(dense))


class _Place(NamedTuple):
    """A tensor `key` of a module that stands at `path` of its model."""

    module: Any
    path: str
    key: str


def _places(model: nn.Module) -> dict[Tensor, list[_Place]]:
    """Where each parameter and buffer stands; shared modules count once."""
    found: dict[Tensor, list[_Place]] = defaultdict(list)
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[tensor].append(_Place(module, path, key))
    return found


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return _parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _cannot_stream(each: Stored | Sparse | Bitmask, where: list[_Place]) -> str:
    """Why a tensor of the file is to be dense from the start; empty where a kernel may take it."""
    if isinstance(each, Stored):
        return "dense in the file"
    if len(where) != 1:
        return "tied to another tensor"
    module, path, key = where[0]
    if not path:
        return "it is the whole model"
    if key != "weight" or not is_known(module):
        return f"no kernel for {type(module).__name__}.{key}"
    flat_rows = each.axis.flat and len(each.shape) == 2 and each.shape[1] % each.pattern.m == 0
    along, _ = known_axis(module, key)
    return "" if along == (Axis(1) if flat_rows else each.axis) else "its groups do not run along the inputs"


def _fill(where: list[_Place], tensor: Tensor) -> None:
    parameter = _parameter(tensor)
    for module, _, key in where:
        setattr(module, key, parameter if key in module._parameters else tensor)


def _check_values(model: nn.Module, layers: set[nn.Module]) -> None:
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "cpu" and not (module in layers and key == "weight"):
                raise ValueError(
                    f"{path}.{key} is on {tensor.device} and not in the file (a buffer that is not persistent): build "
                    "the model on the CPU; only what is in the file may be on the meta device"
                )


def _fold(streamed: _Streamed, example: Any) -> None:
    """Fold batch normalization into the layers before it; into streamed ones whenever they are read."""
    for layer, norm in foldable(streamed.model, example).values():
        stream = streamed.layers.get(layer)
        weight, layer.bias = fuse(layer, layer.weight if stream is None else stream.read(), norm)
        if stream is None:
            layer.weight = weight
        else:
            stream.read = partial(_folded, layer, stream.read, norm)
        replace_module(streamed.model, norm, nn.Identity())


def _folded(layer: Any, read: Callable[[], Tensor], norm: Any) -> Tensor:
    return fuse(layer, read(), norm)[0]


class _Alone(nn.Module):
    """A model of one layer, which is called with each argument."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> None:
        for each in inputs:
            self.layer(each)


def _measured(streamed: _Streamed, weight_dtype: torch.dtype) -> Iterator[tuple[LayerTiming, Packed | None]]:
    """What `ow.plan` finds for each streamed layer, and the layer packed where it was timed."""
    known: dict[object, LayerTiming] = {}
    for layer, stream in streamed.layers.items():
        alike = repr(layer), layer.weight.shape, stream.pattern, frozenset(stream.inputs.items())
        packed = None
        if alike not in known:
            inputs = [x for form, calls in stream.inputs.items() for x in [_random(*form)] * calls]
            patterns = {"layer.weight": stream.pattern}
            with stream.at_hand(layer):
                measured = measure_layers(_Alone(layer), tuple(inputs), patterns, weight_dtype, formats=False)
                ((known[alike], packed),) = measured
        yield replace(known[alike], name=stream.name), packed


def _random(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if 0 in stride:  # expanded: its memory cannot be filled
        return torch.randn(shape).to(dtype)
    return torch.empty_strided(shape, stride, dtype=dtype).normal_()


def _as_chosen(
    streamed: _Streamed, chosen: Mapping[str, str], weight_dtype: torch.dtype
) -> Iterator[tuple[LayerTiming, None]]:
    """The layers as `chosen` wants them, by a kernel that stands in where this CPU lacks one. Raises ValueError where
    it names what cannot be."""
    vectors = kernels.vectors()
    kinds = {name: kind_named(kind).stand_in(vectors) for name, kind in chosen.items()}
    by_name = {each.name: (layer, each.pattern) for layer, each in streamed.layers.items()}
    for name, kind in kinds.items():
        possible = _possible(*by_name[name], weight_dtype) if name in by_name else []
        if kind.name not in possible:
            raise ValueError(
                f"chosen: {name!r} by the kernel {kind.name!r}; for this weight of the file there is: "
                f"{', '.join(possible) or 'none'}"
            )
    for layer, each in streamed.layers.items():
        shapes = tuple(dict.fromkeys(shape for shape, _, _ in each.inputs))
        kind_name = kinds[each.name].name if each.name in kinds else None
        shape = tuple(layer.weight.shape)
        yield LayerTiming(each.name, shape, each.pattern, shapes, kind=kind_name, reason="as chosen"), None


def _possible(layer: Any, pattern: Pattern, weight_dtype: torch.dtype) -> list[str]:
    """The kernels that take a layer, as far as its shape tells."""
    conv = form_of(layer, pattern).conv
    request = Request(pattern, layer.weight.dtype, weight_dtype, torch.device("cpu"), kernels.vectors(), conv)
    return [kind.name for kind in kinds_on("cpu") if not kind.refusal(request)]


def _settle(streamed: _Streamed, timing: LayerTiming, packed: Packed | None, weight_dtype: torch.dtype) -> None:
    """Make a streamed layer what was found: a packed one in its place, or a dense one with its weight."""
    layer, stream = next((layer, each) for layer, each in streamed.layers.items() if each.name == timing.name)
    if timing.kind is None:
        layer.weight = _parameter(stream.read())
        return
    if packed is None:
        with stream.at_hand(layer):
            packed = pack_layer(layer, stream.pattern, kind_named(timing.kind), weight_dtype)
    _put(streamed.model, stream.path, packed)


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
