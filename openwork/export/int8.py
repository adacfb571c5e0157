"""A network in int8 from layer to layer, as `ow.deploy(..., calibrate=batches)` makes it, for ONNX: the same steps,
with products as our operators (csrc/onnxruntime/bytes.h), and `QuantizeLinear` and `DequantizeLinear` where bytes begin
and end. torch's exporter writes everything else as in any network.

Weights are buffers under the names that they get in the file: `fc.weight.values`, `fc.weight.indices`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwork.export.operators import BYTES_OPERATORS, DOMAIN, VERSION
from openwork.files.packing import pack_weight
from openwork.inference.deploy import checked_batches, inference_copy
from openwork.inference.fold import fold_batch_norm, replace
from openwork.inference.int8_network import calibrated
from openwork.inference.layers import Packed, PackedConv2d
from openwork.inference.plan import Int8Network
from openwork.inference.program import Filled, Product, Program, Step
from openwork.nm.groups import Axis
from openwork.ops.bytes import form_of
from openwork.training.selection import PatternChoice, Selection

_SCALES = "openwork_scales"  # in the names of the scales of activations


def int8_module(
    model: nn.Module, example: Any, pattern: Selection | PatternChoice | None, calibrate: Iterable[Any]
) -> tuple[nn.Module | None, Int8Network]:
    """What torch.onnx.export writes as the network in int8, called like the model, and which layers are; None where
    none is, with the reason."""
    batches = checked_batches(calibrate, torch.int8, torch.device("cpu"))
    with torch.inference_mode(False):
        dense, patterns, _ = inference_copy(model, pattern, torch.int8)
        fold_batch_norm(dense, example)
        network, report = calibrated(dense, example, patterns, batches)
        if network is None:
            return None, report
        names = [name.removesuffix(".weight") for name in report.chosen]
        program = network.program(names)
        stored = {name: _stored(network.layers[name]) for name in names}
        for name, weight in stored.items():
            replace(dense, dense.get_submodule(name), weight)
        of = {id(network.layers[name]): weight for name, weight in stored.items()}
        return _module(dense, program, of), report


def _module(dense: Any, program: Program, stored: dict[int, Any]) -> nn.Module:
    """What the steps of a program use, under its names in the dense network, whose hooks on its state dict would be in
    the way."""
    root, scales = nn.Module(), nn.ModuleList()
    for name in ("_parameters", "_buffers", "_modules"):
        getattr(root, name).update(getattr(dense, name))
    program.steps = [_for_onnx(step, stored, scales) for step in program.steps]
    root.add_module(_SCALES, scales)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = program.call.tensors(args, kwargs)
        if isinstance(given, str):
            raise ValueError(f"calibrate: {given}, and its graph is for that")
        return program.run(given)

    forward.__signature__ = inspect.signature(dense.forward)  # type: ignore[attr-defined]
    root.forward = forward
    return root.eval()


def _stored(layer: Packed) -> nn.Module:
    """The weight of a layer as the file has it."""
    packed: Any = layer.packed
    numbers = layer.form.from_rows(packed.unpack())
    values, indices = pack_weight(numbers, layer.pattern, Axis(1))
    weight, holder = nn.Module(), nn.Module()
    for name, tensor in (("values", values), ("indices", indices), ("scales", packed.scales)):
        weight.register_buffer(name, tensor)
    holder.add_module("weight", weight)
    holder.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
    return holder


def _for_onnx(step: Step, stored: dict[int, Any], scales: nn.ModuleList) -> Step:
    """The step as operators of ONNX."""
    if isinstance(step.function, Product):
        function: Callable[..., Any] = partial(_product, step.function, stored[id(step.function.layer)])
        return dataclasses.replace(step, function=function)
    if isinstance(step.function, Filled) and step.function.function is torch.ops.aten.max_pool2d.default:
        return dataclasses.replace(step, function=Filled(_pooled, *step.function.arguments, step.function.refs))
    operators = {torch.ops.openwork.to_bytes.default: _quantized, torch.ops.openwork.from_bytes.default: _dequantized}
    if (operator := operators.get(step.function)) is None:  # type: ignore[call-overload]
        return step
    x, scale, zero = step.args
    of = nn.Module()
    of.register_buffer("scale", torch.tensor(scale))
    of.register_buffer("zero_point", torch.tensor(zero, dtype=torch.uint8))
    scales.append(of)
    return dataclasses.replace(step, function=partial(operator, of), args=(x,))


def _pooled(images: Tensor, *args: Any) -> Tensor:
    y: Any = torch.ops.aten.max_pool2d.default(images, *args)
    y.pooled = images, args
    return y


def _quantized(of: Any, x: Tensor) -> Tensor:
    """What is pooled is quantized before: the same bytes. ONNX Runtime would move QuantizeLinear there itself, and pool
    bytes whose channels come first, which takes it as long as many a product."""
    images, (kernel, *rest) = getattr(x, "pooled", (x, ((),)))
    if len(rest) in (1, 2) and len(kernel) == len(rest[0]) == 2 and hasattr(images, "channels_last"):
        high, wide = rest[1] if len(rest) == 2 else (0, 0)
        attributes = {"kernel_shape": list(kernel), "strides": list(rest[0]), "pads": [high, wide, high, wide]}
        last = images.channels_last
        whole = _symbolic("QuantizeLinear", (last, of.scale, of.zero_point), {}, torch.uint8, last.shape)
        shape = (x.shape[0], *x.shape[2:], x.shape[1])
        return _images(_symbolic("com.microsoft::NhwcMaxPool", (whole,), attributes, torch.uint8, shape))
    return _symbolic("QuantizeLinear", (x, of.scale, of.zero_point), {}, torch.uint8, x.shape)


def _dequantized(of: Any, x: Tensor) -> Tensor:
    return _symbolic("DequantizeLinear", (x, of.scale, of.zero_point), {}, torch.float32, x.shape)


def _product(product: Product, holder: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    layer, weight, form = product.layer, holder.weight, form_of(product.whole, product.scales)
    pattern = layer.pattern
    attributes: dict[str, Any] = {"n": pattern.n, "m": pattern.m, "shape": list(layer.dense_shape)}
    attributes |= {"activation": form.activation, "x_scale": float(product.scale), "x_zero_point": form.zero}
    if form.y_scale:
        attributes |= {"y_scale": float(form.y_scale), "y_zero_point": form.y_zero}
    if residual is not None:
        attributes |= {"added_scale": float(form.residual_scale), "added_zero_point": form.residual_zero}
    dtype, to = (torch.uint8, "") if form.y_scale else (torch.float32, "ToFloat")
    inputs = [weight.values, weight.indices, holder.bias, weight.scales]
    if not isinstance(layer, PackedConv2d):
        inputs += [] if residual is None else [residual]
        return _symbolic(f"QSparseLinear{to}", (x, *inputs), attributes, dtype, (*x.shape[:-1], layer.dense_shape[0]))
    conv = layer.form.conv
    attributes |= {"strides": list(conv.stride), "pads": [*conv.padding] * 2, "dilations": list(conv.dilation)}
    shape = (x.shape[0], *conv.output_size(x.shape[2], x.shape[3]), layer.dense_shape[0])
    inputs += [] if residual is None else [_channels_last(residual)]
    return _images(_symbolic(f"QSparseConv2d{to}", (_channels_last(x), *inputs), attributes, dtype, shape))


def _images(y: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W)."""
    images: Any = y.permute(0, 3, 1, 2).contiguous()  # pooling takes a way of its own for channels that lie last
    images.channels_last = y
    return images


def _channels_last(images: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C). Of a product its own result: else there would be transposes there and back."""
    given: Tensor | None = getattr(images, "channels_last", None)
    return images.permute(0, 2, 3, 1) if given is None else given


def _symbolic(operator: str, inputs: Any, attributes: dict[str, Any], dtype: torch.dtype, shape: Any) -> Tensor:
    ours = operator in BYTES_OPERATORS
    name, version = (f"{DOMAIN}::{operator}", VERSION) if ours else (operator, 1 if "::" in operator else None)
    y: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)
    return y
