"""A model with the values of a file, but for the layers that a kernel may take: those read their weight when it is
needed, and forget it."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openwork.files.foreign.compressed_tensors import Bitmask
from openwork.files.format import Sparse
from openwork.files.header import Stored
from openwork.files.model_state import check_same, tensors_by_name, ties
from openwork.files.reader import Contents
from openwork.inference.geometry import is_known
from openwork.inference.plan import LayerTiming
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.training.known_layers import known_axis
from openwork.training.parametrize import masked_modules, unwrap
from openwork.training.record import sparsity_records

Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of an input."""


@dataclass
class StreamedLayer:
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
        layer._parameters["weight"] = parameter(self.read())
        try:
            yield
        finally:
            layer._parameters["weight"] = empty


@dataclass(frozen=True)
class StreamedModel:
    """A model that has everything but the weights of its streamed layers. `dense`: the weights of two dims or more that
    are not streamed, with the reason."""

    model: nn.Module
    layers: dict[Any, StreamedLayer]
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


def _hooks(layer: nn.Module, stream: StreamedLayer) -> tuple[Any, Any]:
    empty = layer._parameters["weight"]

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            x = arguments[0]
            stream.inputs[tuple(x.shape), x.stride(), x.dtype] += 1
        layer._parameters["weight"] = parameter(stream.read())

    def after(*_: Any) -> None:
        layer._parameters["weight"] = empty

    return layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)


def streamed_model(contents: Contents, model: nn.Module) -> StreamedModel:
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
    layers: dict[Any, StreamedLayer] = {}
    dense = []
    for name, each in contents.tensors.items():
        where = [place for tensor in {empty[alias] for alias in contents.names_of(name)} for place in places[tensor]]
        reason = _cannot_stream(each, where)
        if not reason and isinstance(each, Sparse | Bitmask):
            layers[where[0].module] = StreamedLayer(name, where[0].path, each.pattern, partial(contents.read, name))
            continue
        if len(each.shape) > 1:
            pattern = None if isinstance(each, Stored) else each.pattern
            dense.append(LayerTiming(name, each.shape, pattern, reason=reason))
        _fill(where, contents.read(name))
    _check_values(ready, set(layers))
    return StreamedModel(ready, layers, tuple(dense))


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
    return parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def parameter(tensor: Tensor) -> nn.Parameter:
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
    weight = parameter(tensor)
    for module, _, key in where:
        setattr(module, key, weight if key in module._parameters else tensor)


def _check_values(model: nn.Module, layers: set[nn.Module]) -> None:
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "cpu" and not (module in layers and key == "weight"):
                raise ValueError(
                    f"{path}.{key} is on {tensor.device} and not in the file (a buffer that is not persistent): build "
                    "the model on the CPU; only what is in the file may be on the meta device"
                )
