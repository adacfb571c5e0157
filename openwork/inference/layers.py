"""What `deploy` puts in the place of a layer: a module whose weight lies as a kernel reads it. For inference only.

Its state dict is that of the layer it replaced: `weight` dense with zeros, `bias`, a BatchNorm after it folded in. So a
deployed model is saved and loaded like any, on any machine, into the same model deployed there (where nothing was
folded, into the plain one too); loading packs the weight for the machine at hand, unpickling too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import openwork.kernels as kernels
from openwork.inference.geometry import ConvForm, form_of
from openwork.layouts.layout import Kind, Layout
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight


class PackedLayer(nn.Module):
    """The weight of one layer, packed for a kernel. `relu` is applied to the result where set."""

    _openwork_deployed = True
    packed: Layout
    bias: Tensor | None
    relu = False

    def __init__(self, layer: Any, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype):
        """Raises ValueError where `kind` cannot take the weight, KernelRefused where its library does not."""
        super().__init__()
        weight: Tensor = layer.weight
        self.pattern, self.weight_dtype, self.dtype = pattern, weight_dtype, weight.dtype
        self.dense_shape, self.form = tuple(weight.shape), form_of(layer, pattern)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())
        self.packed = self._pack(kind, weight, self.bias)
        self.register_state_dict_post_hook(_write_dense)
        self.register_load_state_dict_pre_hook(_read_dense)

    @property
    def kind(self) -> str:
        """The name of its kernel."""
        return self.packed.name

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each call: what was packed, or its approximation in `weight_dtype`."""
        numbers, scales = self.packed.unpack(), getattr(self.packed, "scales", None)
        rows = numbers if scales is None else numbers.float() * scales[:, None]
        return self.form.from_rows(rows.to(self.dtype))

    def _pack(self, kind: Kind, weight: Tensor, bias: Tensor | None) -> Layout:
        numbers, scales = quantize_weight(self.form.to_rows(weight.detach()), self.weight_dtype)
        packed = kind.pack(numbers.contiguous(), scales, self.pattern, kernels.vectors())
        packed.take_bias(bias)
        return packed

    def _device(self) -> torch.device:
        return next(self.packed.buffers()).device

    def _check_inference(self) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} is for inference, and its input requires grad: call the deployed model under "
                "torch.inference_mode(), or train the model that was deployed"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed.check_contents()  # a pickle may come from anyone
        self.packed = self.packed.on(kernels.vectors())

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Only moves that keep the packed weight as it is: casts would tear values and indices apart."""
        device = self._device()
        probe = fn(torch.zeros(1, device=device))
        if probe.device != device or probe.dtype != torch.float32:
            raise TypeError(
                f"{type(self).__name__} is packed for {device} in {self.weight_dtype}: convert or move the model, then "
                "deploy"
            )
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pattern}, {self.packed.shape}, {self.weight_dtype}, {self.kind})"


class PackedLinear(PackedLayer):
    """A linear layer (..., K) -> (..., O)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in torch
        if input.requires_grad:
            self._check_inference()
        packed: Any = self._modules["packed"]  # an attribute of a module takes long enough to count for one row
        y: Tensor = packed.linear(input, self._buffers["bias"], self.relu)
        return y

    def search(self, x: Tensor) -> None:
        """Find the fastest algorithm for an input like this one, where the kernel has several."""
        self.packed.search(x)


class PackedConv2d(PackedLayer):
    """A convolution (N, C, H, W) -> (N, O, ., .), in either memory format. A one-dimensional one, (N, C, L) with a
    kernel of one dim, is a convolution of images one pixel high."""

    form: ConvForm
    channels_last = False
    """Bring inputs into that memory format, in which the layer, what follows it, or both are faster."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in torch
        if input.requires_grad:
            self._check_inference()
        y = self.packed.conv2d(self._images(input), self.bias, self.form.conv, self.relu)
        y = y.squeeze(2) if self.form.flat else y
        return y.squeeze(0) if self._unbatched(input) else y

    def search(self, x: Tensor) -> None:
        """Find the fastest algorithm for an input like this one, where the kernel has several."""
        self.packed.search(self._images(x), self.form.conv)

    def _unbatched(self, x: Tensor) -> bool:
        return x.ndim == (2 if self.form.flat else 3)

    def _images(self, x: Tensor) -> Tensor:
        """A batch (N, C, H, W)."""
        images = x.unsqueeze(0) if self._unbatched(x) else x
        images = images.unsqueeze(2) if self.form.flat else images
        channels = self.form.channels * self.form.conv.groups
        if images.shape[1] != channels:  # kernels know it rounded up to M
            raise ValueError(f"input {tuple(x.shape)} has {images.shape[1]} channels; needed {channels}")
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def pack_layer(layer: Any, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype) -> PackedLinear | PackedConv2d:
    """What stands in for a layer."""
    convolves = isinstance(layer, nn.Conv1d | nn.Conv2d)
    return (PackedConv2d if convolves else PackedLinear)(layer, pattern, kind, weight_dtype)


def _write_dense(module: PackedLayer, state: dict[str, Any], prefix: str, _: object) -> None:
    bias = state.pop(prefix + "bias", None)  # the order is that of the dense layer
    state[prefix + "weight"] = module.weight
    if bias is not None:
        state[prefix + "bias"] = bias.to(module.dtype)


def _read_dense(
    module: PackedLayer,
    state: dict[str, Any],
    prefix: str,
    _: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    weight = state.pop(prefix + "weight", None)
    if weight is None:
        missing.append(prefix + "weight")
    elif tuple(weight.shape) != module.dense_shape:
        errors.append(f"{prefix}weight is {tuple(weight.shape)}; the layer that was deployed has {module.dense_shape}")
    else:
        try:
            module.packed.take(_packed_anew(module, weight, state.get(prefix + "bias")))
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}; deploy the model that it belongs to")


def _packed_anew(module: PackedLayer, weight: Tensor, bias: Tensor | None) -> Layout:
    """Where the layer is: a state may come from elsewhere. The bias is of the state too, and torch loads it later."""
    before = module.bias
    fits = before is not None and bias is not None and bias.shape == before.shape
    new = bias.to(before) if fits else before  # type: ignore[union-attr]
    return module._pack(type(module.packed), weight.to(module._device()), new)
