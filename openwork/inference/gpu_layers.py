"""What `deploy` puts in the place of a layer on a GPU. As on a CPU, the state dict is that of the layer it stands for.

    B = rows of input (tokens, pixels), O = outputs, K = inputs

A weight is packed for this GPU and these libraries, so what is copied, pickled or saved is the dense weight, and the
copy packs it again where it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwork.inference.layers import GpuKind, PackedLayer, symmetric_padding
from openwork.kernels.cuda import cusparselt
from openwork.kernels.cuda.cusparselt import Algorithm
from openwork.layouts.layout import conv_rows, from_conv_rows
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import QUANTIZED, quantize, quantize_weight
from openwork.ops.skinny import ROWS, Thin, from_thin, thin


def gpu_module(
    module: Any, pattern: Pattern, kind: GpuKind, weight_dtype: torch.dtype, *, transposed: bool
) -> GpuLayer:
    """What stands in for a layer. Raises ValueError or RuntimeError where `kind` cannot take its weight."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return GpuConv2d(module, pattern, kind, weight_dtype)
    return GpuLinear(module, pattern, kind, weight_dtype, transposed=transposed)


def rows_of(module: Any, *, transposed: bool) -> Tensor:
    """The weight of a layer as that of a product: (O, K)."""
    weight: Tensor = module.weight
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return conv_rows(weight.unsqueeze(2) if weight.ndim == 3 else weight, cusparselt.PATTERN)
    return weight.t() if transposed else weight


def cannot(
    module: Any, pattern: Pattern, kind: GpuKind, weight_dtype: torch.dtype, rows: int, *, transposed: bool
) -> str:
    """Why a layer called with at most so many rows cannot run as `kind`; empty where it can."""
    weight = rows_of(module, transposed=transposed).detach()
    if kind in cusparselt.BACKENDS:
        return cusparselt.cannot(weight, kind, weight_dtype)
    if weight_dtype not in (torch.float16, torch.bfloat16):
        return f"thin products are for float16 and bfloat16, not {weight_dtype}"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "thin products are for linear layers"
    return "" if rows <= ROWS else f"thin products are for up to {ROWS} rows"


class GpuLayer(PackedLayer):
    """The weight of one layer as a GPU kernel reads it."""

    kind: GpuKind
    values: Tensor
    positions: Tensor | None
    packed_bias: Tensor | None
    relu = False

    def __init__(self, layer: Any, pattern: Pattern, kind: GpuKind, weight_dtype: torch.dtype):
        super().__init__(layer.weight, layer.bias, pattern, kind, weight_dtype)
        self.register_load_state_dict_post_hook(_pack_bias)

    @property
    def weight(self) -> Tensor:
        if self.kind in cusparselt.BACKENDS:
            dense = cusparselt.unpack(self._semi_structured())
        else:
            dense = from_thin(self._thin())
        numbers = dense.float() * self.scales[:, None] if self.scales is not None else dense
        return self._from_rows(numbers.to(self.dtype))

    def _pack(self, weight: Tensor) -> None:
        here = self.values.device if "values" in self._buffers else weight.device  # a state may come from elsewhere
        rows, scales = quantize_weight(self._to_rows(weight.detach().to(here)).contiguous(), self.weight_dtype)
        self.shape = (rows.shape[0], rows.shape[1])
        self.algorithms: dict[int, Algorithm] = {}
        if self.kind in cusparselt.BACKENDS:
            packed = cusparselt.pack(rows, self.kind)
            self.padded, values, positions = packed.padded, packed.values, packed.meta
        else:
            layout = thin(rows, self.pattern)
            self.padded, values, positions = self.shape, layout.values, layout.words
        for name, tensor in (("values", values), ("positions", positions), ("scales", scales)):
            self._keep(name, tensor)
        _pack_bias(self)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        """As a buffer, in the memory of the one before where that fits: a CUDA graph may read it there."""
        before = self._buffers.get(name)
        if tensor is None or before is None or (before.shape, before.dtype) != (tensor.shape, tensor.dtype):
            self.register_buffer(name, tensor, persistent=False)
        else:
            before.copy_(tensor)

    def bias_for_kernel(self) -> Tensor | None:
        """In the dtype and size that the kernel takes; None where the kernel takes none."""
        if self.bias is None or self.weight_dtype in QUANTIZED:
            return None
        return F.pad(self.bias, (0, self.padded[0] - len(self.bias))).to(self.weight_dtype)

    def search(self, x: Tensor) -> None:
        """Find the fastest algorithm for an input like this one, once."""
        if self.kind == "cusparselt":
            flat = self._rows(x)
            known = (flat, self._semi_structured(), self.packed_bias, self._out())
            self.algorithms[len(flat)] = cusparselt.algorithm_for(*known)

    def algorithm_for(self, rows: int) -> Algorithm:
        """The algorithm that was fastest for so many rows, or for the number next to it that was searched."""
        found, distance = cusparselt.DEFAULT, -1
        for searched, algorithm in self.algorithms.items():  # no `min(key=...)`: torch.compile does not trace it
            if distance < 0 or abs(searched - rows) < distance:
                found, distance = algorithm, abs(searched - rows)
        return found

    def _product(self, x: Tensor) -> Tensor:
        """(B, K) in `weight_dtype`, or quantized here, to (B, O) in floats."""
        if self.kind not in cusparselt.BACKENDS:
            numbers = self._thin().numbers
            if len(x) > ROWS:
                y = F.linear(x, from_thin(self._thin()), self.packed_bias)
                return y.relu() if self.relu else y
            operator, expand = torch.ops.openwork.thin_linear.default, self.kind == "expand"
            return operator(x, self.values, self.positions, self.packed_bias, numbers, expand, self.relu)
        scales = None
        if self.weight_dtype in QUANTIZED:
            x, scales = quantize(x, self.weight_dtype)
        known = (self.packed_bias, self.algorithm_for(len(x)), self._out())
        y = cusparselt.multiply(x, self._semi_structured(), *known)
        y = y[:, : self.shape[0]]
        if scales is not None:
            assert self.scales is not None
            y = y * self.scales  # int32 becomes float32 here; each of these lines is one pass over what may be large
            y = y.mul_(scales[:, None]) if self.bias is None else torch.addcmul(self.bias, y, scales[:, None])
        return y.relu() if self.relu else y

    def _out(self) -> torch.dtype:
        return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}.get(self.weight_dtype, self.weight_dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """The input of the layer as that of a product, before it is quantized."""
        raise NotImplementedError

    def _semi_structured(self) -> cusparselt.Packed:
        return cusparselt.Packed(self.values, self.positions, self.kind, self.shape, self.padded)

    def _thin(self) -> Thin:
        assert self.positions is not None
        return Thin(self.values, self.positions, self.pattern, self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is packed."""
        return {**self.__dict__, "_buffers": {"bias": self.bias}, "dense": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight, algorithms = state.pop("dense"), state["algorithms"]
        nn.Module.__setstate__(self, state)
        try:
            self._pack(weight)
        except ValueError as error:
            raise RuntimeError(
                f"a layer that was deployed on a GPU comes back on {weight.device}: {error}. Load it onto a GPU "
                "(map_location), or save its state dict, which any plain model loads"
            ) from error
        self.algorithms = algorithms

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        probe = fn(torch.zeros(1, device=self.values.device))
        if probe.device != self.values.device or probe.dtype != torch.float32:
            raise TypeError(
                f"{type(self).__name__} is packed for {self.values.device} in {self.weight_dtype}: convert or move the "
                "model, then deploy"
            )
        return self

    def extra_repr(self) -> str:
        return f"{self.pattern}, {self.shape}, {self.weight_dtype}, {self.kind}"


class GpuLinear(GpuLayer):
    """A linear layer (..., K) -> (..., O). `transposed`: the layer it stands for keeps its weight as (K, O)."""

    def __init__(
        self, layer: Any, pattern: Pattern, kind: GpuKind, weight_dtype: torch.dtype, *, transposed: bool = False
    ):
        self.transposed = transposed
        super().__init__(layer, pattern, kind, weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._check_inference(x)
        y = self._product(self._rows(x))
        return y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.weight_dtype in QUANTIZED else flat.to(self.weight_dtype)

    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t().contiguous() if self.transposed else rows


class GpuConv2d(GpuLayer):
    """A convolution (N, C, H, W) -> (N, O, ., .) as a product of the pixels under its kernel. With a kernel of one
    pixel and images that have their channels last, nothing is copied; a larger kernel copies each pixel once for each
    place. A one-dimensional convolution is one of images one pixel high. The output has its channels last."""

    def __init__(self, conv: nn.Conv2d | nn.Conv1d, pattern: Pattern, kind: GpuKind, weight_dtype: torch.dtype):
        self.flat = isinstance(conv, nn.Conv1d)
        self.kernel = [1] * self.flat + list(conv.kernel_size)
        self.stride = [1] * self.flat + list(conv.stride)
        self.dilation = [1] * self.flat + list(conv.dilation)
        self.padding = [0] * self.flat + symmetric_padding(conv)
        self.channels = conv.in_channels
        super().__init__(conv, pattern, kind, weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._check_inference(x)
        unbatched = x.ndim == (2 if self.flat else 3)
        image = x.unsqueeze(0) if unbatched else x
        patches = self._patches(image)
        y = self._product(patches.reshape(-1, patches.shape[-1])).to(x.dtype)
        y = y.reshape(*patches.shape[:3], self.shape[0]).permute(0, 3, 1, 2)
        y = y.squeeze(2) if self.flat else y
        return y.squeeze(0) if unbatched else y

    def _rows(self, x: Tensor) -> Tensor:
        patches = self._patches(x.unsqueeze(0) if x.ndim == (2 if self.flat else 3) else x)
        return patches.reshape(-1, patches.shape[-1])

    def _patches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outH, outW, K), channels innermost."""
        image = x.unsqueeze(2) if self.flat else x
        image = image if self.weight_dtype in QUANTIZED else image.to(self.weight_dtype)
        image = image.permute(0, 2, 3, 1)
        high, wide = self.padding
        more = -self.channels % cusparselt.PATTERN.m
        if high or wide or more:
            image = F.pad(image, (0, more, wide, wide, high, high))
        if self.kernel == [1, 1]:
            return image[:, :: self.stride[0], :: self.stride[1]]
        image = image.contiguous()
        size = [
            (image.shape[1 + i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for i in (0, 1)
        ]
        steps = image.stride()
        stride = [steps[1 + i] * self.stride[i] for i in (0, 1)] + [steps[1 + i] * self.dilation[i] for i in (0, 1)]
        shape = (len(image), *size, *self.kernel, image.shape[3])
        return image.as_strided(shape, (steps[0], *stride, steps[3])).flatten(3)

    def _to_rows(self, weight: Tensor) -> Tensor:
        return conv_rows(weight.unsqueeze(2) if self.flat else weight, cusparselt.PATTERN)

    def _from_rows(self, rows: Tensor) -> Tensor:
        weight = from_conv_rows(rows, self.channels, (self.kernel[0], self.kernel[1]))
        return weight.squeeze(2) if self.flat else weight


def _pack_bias(layer: GpuLayer, *_: object) -> None:
    """After a state was loaded too: the bias comes after the weight then."""
    layer._keep("packed_bias", layer.bias_for_kernel())
