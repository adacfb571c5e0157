"""What `deploy` puts in the place of a layer: a module whose weight lies as a kernel reads it. For inference only.

Its state dict is that of the layer it replaced: `weight` dense with zeros, `bias`. So a deployed model is saved and
loaded like a plain one, on any machine; loading packs the weight for the machine at hand, unpickling too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

import openwork.kernels as kernels
from openwork.layouts.layout import (
    WINDOWS,
    Dots,
    Panel,
    Rows,
    conv_rows,
    dots,
    from_conv_rows,
    from_dots,
    from_panel,
    from_rows,
    has_dots_layout,
    panel,
    rows,
)
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight
from openwork.ops.sparse_matmul import panel_numbers, rows_numbers

Kind = Literal["panel", "rows", "dots"]
"""Which kernel of a CPU: lanes that are columns of the input, for many tokens or pixels; lanes that are outputs, for
few; or those with inputs as short as the weights, bfloat16 or int8, where the processor multiplies these."""

GpuKind = Literal["cusparselt", "cutlass", "gather", "expand"]
"""Which kernel of a GPU: sparse tensor cores by one library or the other, or the Triton kernels for few tokens."""


_PRODUCTS = {
    "panel": torch.ops.openwork.panel_linear.default,
    "rows": torch.ops.openwork.rows_linear.default,
    "dots": torch.ops.openwork.dots_linear.default,
}


def packed(weight: Tensor, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype) -> Panel | Rows | Dots:
    """A weight (O, K) as the kernel of this machine reads it, its values in the dtype `weight_dtype`."""
    numbers, scales = quantize_weight(weight.detach(), weight_dtype)
    return _laid_out(numbers, scales, pattern, kind)


def _laid_out(numbers: Tensor, scales: Tensor | None, pattern: Pattern, kind: Kind) -> Panel | Rows | Dots:
    if kind == "panel":
        return panel(numbers.contiguous(), pattern, columns=kernels.panel_columns(), scales=scales)
    return (rows if kind == "rows" else dots)(numbers.contiguous(), pattern, lanes=kernels.lanes(), scales=scales)


def kind_here(kind: Kind) -> Kind:
    """The kernel that stands in for one that another machine chose."""
    return "panel" if kind == "dots" and not kernels.has_dots() else kind


def kinds_for(weight: Tensor, pattern: Pattern, weight_dtype: torch.dtype, groups: int = 1) -> tuple[Kind, ...]:
    """The kernels of this machine that can take a layer's weight, stored as that dtype, of a convolution in so many
    groups. `dots` rounds no more than the layer does: its inputs are bfloat16 where the layer's are, and int8 sums are
    exact in every kernel."""
    short = weight_dtype == torch.int8 or weight_dtype == weight.dtype == torch.bfloat16
    rows: tuple[Kind, ...] = ("rows",) if weight.ndim == 2 and pattern.m in WINDOWS else ()
    if short and groups == 1 and kernels.has_dots() and has_dots_layout(weight_dtype, pattern, kernels.lanes()):
        return ("panel", *rows, "dots")
    return ("panel", *rows)


class PackedLayer(nn.Module):
    """The weight of one layer, packed."""

    _openwork_deployed = True
    kind: str
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: Pattern, kind: str, weight_dtype: torch.dtype):
        nn.Module.__init__(self)
        self.pattern, self.kind, self.weight_dtype, self.dtype = pattern, kind, weight_dtype, weight.dtype
        self.dense_shape = tuple(weight.shape)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self._pack(weight)
        self.register_state_dict_post_hook(_write_dense)
        self.register_load_state_dict_pre_hook(_read_dense)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each call: what was packed, or its approximation in `weight_dtype`."""
        raise NotImplementedError

    def _pack(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _to_rows(self, weight: Tensor) -> Tensor:
        """The layer's weight as (O, K)."""
        raise NotImplementedError

    def _from_rows(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_inference(self, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} is for inference, and its input requires grad: call the deployed model under "
                "torch.inference_mode(), or train the model that was deployed"
            )


class _CpuLayer(PackedLayer):
    """As the native kernels of a CPU read it."""

    kind: Kind
    values: Tensor
    positions: Tensor

    @property
    def weight(self) -> Tensor:
        numbers = self._numbers()
        if self.scales is not None:
            numbers = numbers.float() * self.scales[:, None]
        return self._from_rows(numbers.to(self.dtype))

    def _numbers(self) -> Tensor:
        """What is packed, as (O, K): of an int8 weight the int8 numbers."""
        layout = self._layout()
        if isinstance(layout, Panel):
            return from_panel(layout)
        return from_rows(layout) if isinstance(layout, Rows) else from_dots(layout)

    def _pack(self, weight: Tensor) -> None:
        self._take(packed(self._to_rows(weight.cpu()), self.pattern, self.kind, self.weight_dtype))

    def _take(self, layout: Panel | Rows | Dots) -> None:
        positions = layout.words if isinstance(layout, Rows) else layout.positions
        for name, tensor in (("values", layout.values), ("positions", positions), ("scales", layout.scales)):
            self.register_buffer(name, tensor, persistent=False)
        self.numbers = panel_numbers(layout) if isinstance(layout, Panel) else rows_numbers(layout)

    def _layout(self) -> Any:
        tensors = (self.values, self.positions, self.scales, self.pattern)
        if self.kind == "panel":
            _, _, tile, columns, O, K = self.numbers
            return Panel(*tensors, (O, K), tile, columns)
        _, _, lanes, O, K = self.numbers
        return (Rows if self.kind == "rows" else Dots)(*tensors, (O, K), lanes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        other = kind_here(self.kind)
        here = kernels.panel_columns() if other == "panel" else kernels.lanes()
        if other != self.kind or self.numbers[3 if other == "panel" else 2] != here:
            numbers, self.kind = self._numbers(), other
            self._take(_laid_out(numbers, self.scales, self.pattern, other))

    def _input(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16 if self.kind == "dots" and self.scales is None else torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Only moves that keep the packed weight as it is: casts would tear values and positions apart."""
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise TypeError(
                f"{type(self).__name__} is packed for this CPU in {self.weight_dtype}: convert the model, then deploy"
            )
        return self

    def extra_repr(self) -> str:
        return f"{self.pattern}, {tuple(self.numbers[-2:])}, {self.weight_dtype}, {self.kind}"


class SparseLinear(_CpuLayer):
    """A linear layer (..., K) -> (..., O) with a packed weight, `relu` applied to the result where set. `transposed`:
    the layer it stands for keeps its weight as (K, O)."""

    relu = False

    def __init__(
        self, layer: Any, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype, *, transposed: bool = False
    ):
        self.transposed = transposed
        super().__init__(layer.weight, layer.bias, pattern, kind, weight_dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in torch
        self._check_inference(input)
        product = _PRODUCTS[self.kind]
        y = product(self._input(input), self.values, self.positions, self.scales, self.bias, self.numbers, self.relu)
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t().contiguous() if self.transposed else rows


class SparseConv2d(_CpuLayer):
    """A convolution (N, C, H, W) -> (N, O, ., .) with a packed weight, in either memory format. A one-dimensional one,
    (N, C, L) with a kernel of one dim, is a convolution of images one pixel high."""

    relu = False
    channels_last = False
    """Bring inputs into that memory format, in which the layer, what follows it, or both are faster."""

    def __init__(self, conv: nn.Conv2d | nn.Conv1d, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype):
        self.flat = isinstance(conv, nn.Conv1d)
        self.kernel = [1] * self.flat + list(conv.kernel_size)
        self.stride = [1] * self.flat + list(conv.stride)
        self.dilation = [1] * self.flat + list(conv.dilation)
        self.padding = [0] * self.flat + symmetric_padding(conv)
        self.groups, self.channels = conv.groups, conv.in_channels // conv.groups
        super().__init__(conv.weight, conv.bias, pattern, kind, weight_dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in torch
        self._check_inference(input)
        unbatched = input.ndim == (2 if self.flat else 3)
        image = input.unsqueeze(0) if unbatched else input
        image = image.unsqueeze(2) if self.flat else image
        if image.shape[1] != self.channels * self.groups:  # kernels know it rounded up to M
            raise ValueError(
                f"input {tuple(input.shape)} has {image.shape[1]} channels; needed {self.channels * self.groups}"
            )
        image = image.contiguous(memory_format=torch.channels_last) if self.channels_last else image
        layout = (self.values, self.positions, self.scales, self.bias, self.numbers)
        geometry = (self.kernel, self.stride, self.padding, self.dilation)
        if self.kind == "dots":
            y = torch.ops.openwork.dots_conv2d.default(self._input(image), *layout, *geometry, self.relu)
        else:
            y = torch.ops.openwork.panel_conv2d.default(image.float(), *layout, *geometry, self.groups, self.relu)
        y = y.squeeze(2) if self.flat else y
        y = y.squeeze(0) if unbatched else y
        return y if input.dtype == torch.float32 else y.to(input.dtype)

    def _to_rows(self, weight: Tensor) -> Tensor:
        return conv_rows(weight.unsqueeze(2) if self.flat else weight, self.pattern)

    def _from_rows(self, rows: Tensor) -> Tensor:
        weight = from_conv_rows(rows, self.channels, (self.kernel[0], self.kernel[1]))
        return weight.squeeze(2) if self.flat else weight


def symmetric_padding(conv: nn.Conv2d | nn.Conv1d) -> list[int]:
    """The zeros added on both sides of each dim. Raises ValueError where the sides differ, or are not zeros."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r}: kernels pad with zeros")
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(each % 2 for each in both):
        raise ValueError(f"padding='same' of a kernel {conv.kernel_size} pads one side more than the other")
    return [each // 2 for each in both]


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
            module._pack(weight)
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}; deploy the model that it belongs to")
