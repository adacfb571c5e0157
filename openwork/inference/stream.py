"""From a compressed file to a deployed model, without the dense model in between: one dense weight at a time.

Layers that a kernel may take are *streamed*: they stand in the model without a weight, which is read from the file
when the layer is called or timed, and forgotten afterwards, until it is decided what the layer becomes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import openwork.kernels as kernels
from openwork.files.hub import local
from openwork.files.reader import opened
from openwork.inference.choose import Packed, measure_layers
from openwork.inference.deploy import check_weight_dtype, own_dtype
from openwork.inference.fold import foldable, following_relu
from openwork.inference.folded import fold_away, fuse
from openwork.inference.geometry import form_of
from openwork.inference.layers import PackedLayer, pack_layer
from openwork.inference.plan import LayerTiming, Plan, environment
from openwork.inference.streamed_model import StreamedModel, parameter, streamed_model
from openwork.layouts.layout import Request, kind_named, kinds_on, refusal_of
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import unwrap
from openwork.utils.caller import outside
from openwork.utils.example import run
from openwork.utils.torch_private import tree_leaves


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

    >>> import tempfile
    >>> import openwork as ow
    >>> _ = ow.project(model := nn.Sequential(nn.Linear(64, 8)), "1:4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ow.save(model, path := f"{folder}/net.safetensors", pattern="1:4")
    ...     fast = ow.load_deployed(path, model, torch.randn(1, 64), chosen={"0.weight": "gemm"})
    >>> fast.deployment.chosen
    {'0.weight': 'gemm'}
    """
    model = unwrap(model)
    elsewhere = {str(x.device) for x in tree_leaves(example) if isinstance(x, Tensor) and x.device.type != "cpu"}
    if elsewhere:
        raise ValueError(
            f"load_deployed packs for the CPU, the example is on {', '.join(sorted(elsewhere))}: move it to the "
            "CPU, or ow.load the file into a model there and ow.deploy that"
        )
    weight_dtype = weight_dtype or own_dtype(model)
    check_weight_dtype(weight_dtype, "cpu")
    with local(path) as here, opened(here) as contents, torch.no_grad():
        streamed = streamed_model(contents, model)
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
        why = "no layer is faster sparse here: the model" if chosen is None else "chosen is empty: every layer"
        warnings.warn(f"{why} is dense (see model.deployment)", stacklevel=outside())
    streamed.model.deployment = plan  # type: ignore[assignment]
    return streamed.model


def _fold(streamed: StreamedModel, example: Any) -> None:
    """Fold batch normalization into the layers before it; into streamed ones whenever they are read."""
    for layer, norm in foldable(streamed.model, example).values():
        stream = streamed.layers.get(layer)
        had_bias = layer.bias is not None
        weight, layer.bias = fuse(layer, layer.weight if stream is None else stream.read(), norm)
        if stream is None:
            layer.weight = weight
        else:
            stream.read = partial(_folded, layer, stream.read, norm)
        fold_away(streamed.model, layer, norm, had_bias)


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


def _measured(streamed: StreamedModel, weight_dtype: torch.dtype) -> Iterator[tuple[LayerTiming, Packed | None]]:
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
    streamed: StreamedModel, chosen: Mapping[str, str], weight_dtype: torch.dtype
) -> Iterator[tuple[LayerTiming, None]]:
    """The layers as `chosen` wants them, by a kernel that stands in where this CPU lacks one. Raises ValueError where
    it names what cannot be."""
    vectors = kernels.vectors()
    kinds = {name: kind_named(kind).stand_in(vectors) for name, kind in chosen.items()}
    by_name = {each.name: (layer, each.pattern) for layer, each in streamed.layers.items()}
    for name in sorted(chosen.keys() - by_name.keys() - {each.name for each in streamed.dense}):
        there = ", ".join(by_name) or "no sparse weight that a kernel could take"
        raise ValueError(f"chosen names {name!r}, which the file does not have; it has {there}")
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
    return [kind.name for kind in kinds_on("cpu") if not refusal_of(kind, request)]


def _settle(streamed: StreamedModel, timing: LayerTiming, packed: Packed | None, weight_dtype: torch.dtype) -> None:
    """Make a streamed layer what was found: a packed one in its place, or a dense one with its weight."""
    layer, stream = next((layer, each) for layer, each in streamed.layers.items() if each.name == timing.name)
    if timing.kind is None:
        layer.weight = parameter(stream.read())
        return
    if packed is None:
        with stream.at_hand(layer):
            packed = pack_layer(layer, stream.pattern, kind_named(timing.kind), weight_dtype)
    _put(streamed.model, stream.path, packed)


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
