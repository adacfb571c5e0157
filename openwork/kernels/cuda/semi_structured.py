"""2:4 on sparse tensor cores, by cuSPARSELt and by CUTLASS: many rows of input, linear layers and convolutions.

    B = rows of input (tokens, pixels), O = outputs, K = inputs

What is packed belongs to a GPU and a version of the library, so what is copied or pickled is the weight, and the copy
packs it again where it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwork.kernels.cuda import cusparselt
from openwork.layouts.conv import ConvGeometry, patches
from openwork.layouts.layout import Algorithm, Layout, Request, Vectors, register_kind
from openwork.nm.pattern import Pattern, within_2_4
from openwork.nm.quantize import QUANTIZED, quantize

_HALVES = (torch.float16, torch.bfloat16)


class SemiStructuredNumbers(NamedTuple):
    """The shape of the weight, filled up to what the library needs."""

    n: int
    m: int
    padded_outputs: int
    padded_inputs: int
    outputs: int
    inputs: int


class SemiStructured(Layout):
    """`values` and `meta` as the library packs them; `scales` (O,) of a quantized weight; `kernel_bias` (O padded,) in
    the dtype of the weight, where the library adds it."""

    device_type = "cuda"
    best_rows = range(1, 2**63)
    Numbers = SemiStructuredNumbers
    values: Tensor
    meta: Tensor | None
    scales: Tensor | None
    kernel_bias: Tensor | None
    numbers: SemiStructuredNumbers

    def __init__(self, packed: cusparselt.Packed, scales: Tensor | None, pattern: Pattern):
        tensors = {"values": packed.values, "meta": packed.meta, "scales": scales, "kernel_bias": None}
        super().__init__(tensors, SemiStructuredNumbers(pattern.n, pattern.m, *packed.padded, *packed.shape))
        self.algorithms: dict[int, Algorithm] = {}

    @classmethod
    def refusal(cls, request: Request) -> str:
        if reason := cusparselt.backend_refusal(cls.name, request.weight_dtype, request.device):
            return reason
        if request.conv is not None and request.conv.groups > 1:
            return f"a convolution in {request.conv.groups} groups: sparse tensor cores multiply one matrix"
        if not within_2_4(request.pattern):
            return f"{request.pattern} is not within 2:4, which sparse tensor cores multiply"
        return "" if request.finite else "the weight holds numbers that are not finite"

    @classmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: Pattern, vectors: Vectors) -> SemiStructured:
        return cls(cusparselt.pack_2_4(weight.contiguous(), cls.name), scales, pattern)

    def unpack(self) -> Tensor:
        return cusparselt.unpack(self._packed())

    def take_bias(self, bias: Tensor | None) -> None:
        if bias is not None and self.values.dtype not in QUANTIZED:
            bias = F.pad(bias, (0, self.numbers.padded_outputs - len(bias))).to(self.values.dtype)
            self.kernel_bias = bias

    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y = self._matmul(self._rows(x, None), bias, relu)
        return y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def conv2d(self, x: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool) -> Tensor:
        """The output has its channels last."""
        y = self._matmul(self._rows(x, geometry), bias, relu).to(x.dtype)
        size = geometry.output_size(x.shape[2], x.shape[3])
        return y.reshape(len(x), *size, self.shape[0]).permute(0, 3, 1, 2)

    def algorithm_for(self, rows: int) -> Algorithm:
        """The algorithm that was fastest for so many rows, or for the number next to it that was searched."""
        nearest, distance = cusparselt.DEFAULT, -1
        for searched, algorithm in self.algorithms.items():  # no `min(key=...)`: torch.compile does not trace it
            if distance < 0 or abs(searched - rows) < distance:
                nearest, distance = algorithm, abs(searched - rows)
        return nearest

    def _rows(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """The input as (B, K), in the dtype of the weight unless it is to be quantized."""
        quantized = self.values.dtype in QUANTIZED
        x = x if quantized else x.to(self.values.dtype)
        inputs = x if geometry is None else patches(x, geometry, self.pattern)
        return inputs.reshape(-1, inputs.shape[-1])

    def _matmul(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """(B, K) to (B, O), in the dtype of the weight or, where it is quantized, in float32."""
        input_scales = None
        if self.values.dtype in QUANTIZED:
            x, input_scales = quantize(x, self.values.dtype)
        y = cusparselt.multiply(x, self._packed(), self.kernel_bias, self.algorithm_for(len(x)), self._sum_dtype())
        y = y[:, : self.shape[0]]
        if input_scales is not None:
            assert self.scales is not None
            y = y * self.scales  # int32 becomes float32 here; each of these lines is one pass over what may be large
            y = y.mul_(input_scales[:, None]) if bias is None else torch.addcmul(bias, y, input_scales[:, None])
        return y.relu() if relu else y

    def _packed(self) -> cusparselt.Packed:
        padded = (self.numbers.padded_outputs, self.numbers.padded_inputs)
        return cusparselt.Packed(self.values, self.meta, self.name, self.shape, padded)

    def _sum_dtype(self) -> torch.dtype:
        dtype = self.values.dtype
        return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}.get(dtype, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is packed, and the weight."""
        kept = {name: self._buffers[name] for name in ("scales", "kernel_bias")}
        return {**self.__dict__, "_buffers": kept, "weight": self.unpack()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight = state.pop("weight")
        nn.Module.__setstate__(self, state)
        try:
            packed = cusparselt.pack_2_4(weight, self.name)
        except ValueError as error:
            raise RuntimeError(
                f"a layer that was deployed on a GPU comes back on {weight.device}: {error}. Load it onto a GPU "
                "(map_location), or save its state dict, which any plain model loads"
            ) from error
        for name, tensor in (("values", packed.values), ("meta", packed.meta)):
            self.register_buffer(name, tensor, persistent=False)
        self.numbers = SemiStructuredNumbers(self.pattern.n, self.pattern.m, *packed.padded, *packed.shape)


@register_kind
class CuSparseLt(SemiStructured):
    """Several algorithms for each shape, of which the fastest is searched."""

    name = "cusparselt"
    weight_dtypes = (*_HALVES, *QUANTIZED)

    def search(self, x: Tensor, geometry: ConvGeometry | None = None) -> None:
        rows, known = self._rows(x, geometry), (self.kernel_bias, self._sum_dtype())
        self.algorithms[len(rows)] = cusparselt.algorithm_for(rows, self._packed(), *known)


@register_kind
class Cutlass(SemiStructured):
    """On GPUs of compute capability 8.x."""

    name = "cutlass"
    weight_dtypes = _HALVES
