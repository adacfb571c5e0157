"""Which tensors an operator multiplies, and along which axis of each it sums: one table of torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from openwork.nm.groups import Axis


@dataclass(frozen=True)
class Factor:
    """One operand of a product. `axes` are those of `tensor` that the product sums over, the one that layers of this
    kind group along first.

    `place` says what stands there by custom: "data" is the left side of a product of two matrices, "weight" its right
    side or what a layer calls its weight, "batch" either side of a batched product.
    """

    tensor: Tensor
    axes: tuple[Axis, ...]
    place: str = "weight"


Product = list[Factor]


def products(func: Any, arguments: list[Any]) -> list[Product]:
    """The products that an operator of the table computes from its `arguments`, in order: one of most, one for each
    weight of a recurrent layer."""
    return _TABLE[name_of(func)](arguments)


def is_product(func: Any) -> bool:
    """Whether an operator multiplies matrices."""
    return func.namespace in ("aten", "torchvision", "transformers") and name_of(func) in _TABLE


def name_of(func: Any) -> str:
    """The name of an operator, alike for the one that writes in place."""
    name: str = func._overloadpacket.__name__
    return name if name.endswith("__") else name.removesuffix("_")


def in_order(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Arguments of an operator in the order of its schema."""
    rest = [kwargs.get(each.name, each.default_value) for each in func._schema.arguments[len(args) :]]
    return [*args, *rest]


def _pair(first: int) -> Callable[[list[Any]], list[Product]]:
    """Two matrices or batches of them, or vectors, beginning with argument `first`."""

    def find(given: list[Any]) -> list[Product]:
        left, right = given[first : first + 2]
        batched = left.ndim > 2 or right.ndim > 2
        return [
            [
                Factor(left, (Axis(left.ndim - 1),), "batch" if batched else "data"),
                Factor(right, (Axis(max(right.ndim - 2, 0)),), "batch" if batched else "weight"),
            ]
        ]

    return find


def _layer(*places: int) -> Callable[[list[Any]], list[Product]]:
    """Linear layers in one operator: data first; weights (O, K) at these places, or lists of them."""

    def find(given: list[Any]) -> list[Product]:
        listed = [given[place] if isinstance(given[place], list | tuple) else [given[place]] for place in places]
        data, weights = given[0], [each for some in listed for each in some if each.ndim == 2]
        left = Factor(data, (Axis(data.ndim - 1),), "data")
        return [[left, Factor(weight, (Axis(1),))] for weight in weights]

    return find


def _convolution(given: list[Any]) -> list[Product]:
    """Sums over the input channels and the places of the kernel."""
    data, weight, _, _, _, _, transposed, _, groups = given[:9]
    channels = Axis(0, blocks=groups) if transposed else Axis(1)
    kernel = [Axis(dim) for dim in range(2, weight.ndim)]
    left = Factor(data, (Axis(data.ndim - weight.ndim + 1, blocks=groups),), "data")
    return [[left, Factor(weight, (channels, *kernel))]]


def _deformed_convolution(given: list[Any]) -> list[Product]:
    return [[Factor(given[1], (Axis(1), Axis(2), Axis(3)))]]


def _temporal_convolution(given: list[Any]) -> list[Product]:
    """Data (T, B, C), weight (kernel, C, O)."""
    return [[Factor(given[0], (Axis(2),), "data"), Factor(given[1], (Axis(1), Axis(0)))]]


def _trilinear(given: list[Any]) -> list[Product]:
    """Of `nn.Bilinear`: between two inputs a weight, with dims to be put in before those summed are counted."""
    weight, expanded, summed = given[1], sorted(given[4]), given[6]
    axes = tuple(Axis(dim - sum(new < dim for new in expanded)) for dim in summed if dim not in expanded)
    return [[Factor(weight, axes[::-1])]] if axes else []


_TABLE: dict[str, Callable[[list[Any]], list[Product]]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_scaled_mm_v2"), _pair(0)),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_sparse_mm"), _pair(0)),
    "grouped_mm_fallback": _pair(0),  # of transformers, where torch has no grouped product
    **dict.fromkeys(("addmm", "_addmm_activation", "addmv", "baddbmm", "addbmm", "_sparse_addmm"), _pair(1)),
    **dict.fromkeys(("linear", "mkldnn_linear", "_weight_int8pack_mm"), _layer(1)),
    "mkldnn_rnn_layer": _layer(1, 2),
    "_cudnn_rnn": _layer(1),
    "miopen_rnn": _layer(1),
    "_native_multi_head_attention": _layer(5, 7),
    "_transformer_encoder_layer_fwd": _layer(3, 5, 14, 16),
    "convolution": _convolution,
    "_trilinear": _trilinear,
    "conv_tbc": _temporal_convolution,
    "deform_conv2d": _deformed_convolution,
}
