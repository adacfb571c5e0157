"""What `deploy` puts in the place of a layer: a module whose weight lies as a kernel reads it. For inference only.

It is a module like the one it replaces: of its class (`nn.Linear`, `nn.Conv1d`, `nn.Conv2d`), with its attributes, its
parameters by their names, shapes and dtypes, its dtype rules, and its state dict: `weight` dense with zeros, `bias`, a
BatchNorm after it folded in. Loading packs the weight for the machine at hand, unpickling too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork.kernels as kernels
from openwork.inference.geometry import ConvForm, Form, form_of
from openwork.inference.packed_weight import PackedWeight
from openwork.layouts import Gemm
from openwork.layouts.layout import Kind, Layout, Request, refusal_of
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight
from openwork.utils.counted import counted

_CASTS = (torch.float32, torch.bfloat16, torch.float16)


class PackedLayer(nn.Module):
    """The weight of one layer, packed for a kernel. `relu` is applied to the result where set."""

    _openwork_deployed = True
    packed: Layout
    bias: Tensor | None
    relu = False

    def __init__(self, layer: Any, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype):
        """Raises ValueError where `kind` cannot take the weight, KernelRefused where its library does not."""
        nn.Module.__init__(self)  # not that of the class it stands for, which would make a weight
        self.__dict__.update({name: value for name, value in vars(layer).items() if name not in self.__dict__})
        self.training = layer.training
        self._buffers.update(layer._buffers)
        self._modules.update(layer._modules)
        weight: Tensor = layer.weight
        self.pattern, self.weight_dtype, self.dtype = pattern, weight_dtype, weight.dtype
        self.dense_shape, self.form = tuple(weight.shape), form_of(layer, pattern)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.packed = self._pack(kind, weight, bias)
        self._show(bias)

    @property
    def kind(self) -> str:
        """The name of its kernel."""
        return self.packed.name

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked by whatever computes with it: what was packed, or its approximation in
        `weight_dtype`. Assigning one packs it."""
        shown = self._parameters.get("weight")
        return self._dense() if torch.compiler.is_compiling() or shown is None else shown

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            return super().__setattr__(name, value)
        if not isinstance(value, Tensor) or tuple(value.shape) != self.dense_shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"weight {found} for a deployed layer; needed a tensor {self.dense_shape}")
        self.packed.take(self._pack(type(self.packed), value.to(self._device(), self.dtype), self.bias))
        return None

    def _dense(self) -> Tensor:
        return _unpacked(self.packed, self.form, self.dtype)

    def _show(self, bias: nn.Parameter | None) -> None:
        """The parameters of the layer, in its order."""
        unpack = partial(_checked_and_unpacked, self.packed, self.form, self.dtype)
        weight: Any = PackedWeight.of(self.dense_shape, self.dtype, self._device(), unpack)
        self._parameters.update({"weight": weight, "bias": bias})

    def _pack(self, kind: Kind, weight: Tensor, bias: Tensor | None) -> Layout:
        numbers, scales = quantize_weight(self.form.to_rows(weight.detach()), self.weight_dtype)
        packed = kind.pack(numbers.contiguous(), scales, self.pattern, kernels.vectors())
        packed.take_bias(None if bias is None else bias.detach().float())
        return packed

    def _device(self) -> torch.device:
        return next(self.packed.buffers()).device

    def _is_packed(self) -> bool:
        """Whether the weight is the packed one. `torch.func.functional_call` puts another in its place meanwhile, with
        which the layer computes as a dense one does."""
        return torch.compiler.is_compiling() or type(self._parameters.get("weight")) in (PackedWeight, type(None))

    def _ready(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input as the dense layer would take it, and the bias as kernels do. Raises RuntimeError where gradients
        are asked for, TypeError where the dense layer refuses the dtype as well."""
        bias = self._parameters["bias"]
        if torch.is_grad_enabled():
            asks = [name for name, each in self._parameters.items() if each is not None and each.requires_grad]
            if x.requires_grad or asks:
                raise RuntimeError(
                    f"{type(self).__name__} is for inference, and its {'input' if x.requires_grad else asks[0]} "
                    "requires grad: call the deployed model under torch.inference_mode(), or train the model that was "
                    "deployed"
                )
        dtype, device = self.dtype, self.packed.device_type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype) if x.dtype in _CASTS else x
        if x.dtype != dtype:
            raise TypeError(
                f"input of {x.dtype} for a layer in {dtype}: convert it, as for the dense layer, or call the model "
                "under torch.autocast"
            )
        return x, bias if bias is None or bias.dtype == torch.float32 else bias.float()

    def __getstate__(self) -> dict[str, Any]:
        """Without the weight as a parameter, which is made again of what is packed."""
        state = self.__dict__.copy()
        state["_parameters"] = {name: each for name, each in self._parameters.items() if name != "weight"}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = dict(state["_parameters"])
        super().__setstate__({**state, "_parameters": {"weight": None, **parameters}})
        self.packed.check_contents()  # a pickle may come from anyone
        self.packed = self.packed.on(kernels.vectors())
        self._show(parameters["bias"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # detached, it is dense already
            destination[prefix + "weight"] = nn.Parameter(self._dense(), requires_grad=False)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """`weight` is packed; the rest is torch's."""
        weight = state_dict.pop(prefix + "weight", None)
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif tuple(weight.shape) != self.dense_shape:
            found = tuple(weight.shape)
            error_msgs.append(f"{prefix}weight is {found}; the layer that was deployed has {self.dense_shape}")
        else:
            try:
                self.packed.take(self._packed_anew(weight, state_dict.get(prefix + "bias")))
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}; deploy the model that it belongs to")
        shown, self._parameters["weight"] = self._parameters["weight"], None  # so that torch does not ask for it
        try:
            rest = (strict, missing_keys, unexpected_keys, error_msgs)
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        finally:
            self._parameters["weight"] = shown

    def _packed_anew(self, weight: Tensor, bias: Tensor | None) -> Layout:
        """Where the layer is: a state may come from elsewhere. The bias is of the state too, and torch loads it
        later."""
        before = self.bias
        fits = before is not None and bias is not None and bias.shape == before.shape
        new = bias.to(before) if fits else before  # type: ignore[union-attr]
        return self._pack(type(self.packed), weight.to(self._device(), self.dtype), new)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moves that keep the packed weight where it is, casts that pack it anew, and sharing."""
        device = self._device()
        probe = fn(torch.zeros(1, dtype=self.dtype, device=device))
        if probe.device != device:
            self._refuse(device)
        dense = fn(self._dense()) if probe.dtype != self.dtype else None
        bias = None if self.bias is None else nn.Parameter(fn(self.bias.detach()), self.bias.requires_grad)
        if dense is not None:
            self._cast(dense, bias)
        if probe.is_shared() and device.type == "cpu":
            self.packed._apply(Tensor.share_memory_)
        for name, child in self._modules.items():
            if child is not None and name != "packed":
                child._apply(fn)
        self._show(bias)
        return self

    def _cast(self, dense: Tensor, bias: Tensor | None) -> None:
        """Pack the weight anew for another dtype of the layer; on a CPU kernels compute float16 in float32."""
        device, own = dense.device, self.weight_dtype == self.dtype or self.weight_dtype == torch.float32
        stored = torch.float32 if dense.dtype == torch.float16 else dense.dtype
        weight_dtype = stored if own else self.weight_dtype
        request = Request(self.pattern, stored, weight_dtype, device, kernels.vectors(), self.form.conv)
        kind = Gemm if refusal_of(type(self.packed), request) else type(self.packed)
        if type(self.packed).device_type != "cpu" or refusal_of(kind, request):
            self._refuse(device)
        self.weight_dtype, self.dtype = weight_dtype, dense.dtype
        self.packed = self._pack(kind, dense.to(stored), bias)

    def _refuse(self, device: torch.device) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is packed for {device} in {self.weight_dtype}: convert or move the model, then "
            "deploy"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pattern}, {self.packed.shape}, {self.weight_dtype}, {self.kind})"


def _checked_and_unpacked(packed: Layout, form: Form, dtype: torch.dtype) -> Tensor:
    packed.check_contents()
    return _unpacked(packed, form, dtype)


def _unpacked(packed: Any, form: Form, dtype: torch.dtype) -> Tensor:
    numbers, scales = packed.unpack(), getattr(packed, "scales", None)
    rows = numbers if scales is None else numbers.float() * scales[:, None]
    return form.from_rows(rows.to(dtype))


class _PackedProduct(PackedLayer):
    """A linear layer (..., K) -> (..., O)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in torch
        if not self._is_packed():
            y = F.linear(input, self.form.to_rows(self.weight), self.bias)
            return y.relu() if self.relu else y
        x, bias = self._ready(input)
        packed: Layout = self._modules["packed"]  # type: ignore[assignment]
        return packed.linear(x, bias, self.relu)  # `self.packed` takes long enough to count for one row

    def search(self, x: Tensor) -> None:
        """Find the fastest algorithm for an input like this one, where the kernel has several."""
        self.packed.search(x)


class PackedLinear(_PackedProduct, nn.Linear):  # type: ignore[misc, override]
    """An `nn.Linear`."""


class PackedConv1D(_PackedProduct):
    """A `Conv1D` of transformers: a linear layer whose weight is (K, O)."""


class _PackedConv(PackedLayer):
    """A convolution (N, C, H, W) -> (N, O, ., .), in either memory format. A one-dimensional one, (N, C, L) with a
    kernel of one dim, is a convolution of images one pixel high."""

    form: ConvForm
    channels_last = False
    """Bring inputs into that memory format, in which the layer, what follows it, or both are faster."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in torch
        if not self._is_packed():
            y = self._conv_forward(input, self.weight, self.bias)  # type: ignore[operator]
            return y.relu() if self.relu else y
        x, bias = self._ready(input)
        y = self.packed.conv2d(self._images(x), bias, self.form.conv, self.relu)
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
            raise ValueError(f"input {tuple(x.shape)} has {counted(images.shape[1], 'channel')}; needed {channels}")
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


class PackedConv1d(_PackedConv, nn.Conv1d):  # type: ignore[override]
    """An `nn.Conv1d`."""


class PackedConv2d(_PackedConv, nn.Conv2d):  # type: ignore[override]
    """An `nn.Conv2d`."""


Packed = PackedLinear | PackedConv1D | PackedConv1d | PackedConv2d
PACKED = (PackedLinear, PackedConv1D, PackedConv1d, PackedConv2d)


@contextmanager
def without_dense_weights(model: nn.Module) -> Iterator[None]:
    """The weights of deployed layers are not among the parameters meanwhile: exporters would write them, dense."""
    layers = [each for each in model.modules() if isinstance(each, PackedLayer)]
    shown = [each._parameters.pop("weight") for each in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, shown, strict=True):
            layer._parameters = {"weight": weight, **layer._parameters}


def pack_layer(layer: Any, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype) -> Packed:
    """What stands in for a layer."""
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, pattern, kind, weight_dtype)
    if isinstance(layer, nn.Conv1d):
        return PackedConv1d(layer, pattern, kind, weight_dtype)
    if isinstance(layer, nn.Conv2d):
        return PackedConv2d(layer, pattern, kind, weight_dtype)
    return PackedConv1D(layer, pattern, kind, weight_dtype)
