"""Which axis of a weight its layer sums over, by the class of the layer."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from openwork.nm.groups import Axis

UNKNOWN = "no known reduction axis in"
"""How the reason begins that only the products of an example can tell the axis."""


def known_axis(module: nn.Module, tensor_name: str) -> tuple[Axis | None, str]:
    """The reduction axis of a module's weight, or None and the reason why it has none."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, "embedding: rows are looked up, not multiplied"
    if tensor_name == "weight" and isinstance(module, nn.Linear):
        return Axis(1), ""
    if tensor_name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return _conv_axis(module)
    if isinstance(module, nn.MultiheadAttention) and tensor_name.endswith("proj_weight"):
        return Axis(1), ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and tensor_name.startswith("weight"):
        return Axis(1), ""
    if tensor_name == "weight" and is_hf_conv1d(module):
        return Axis(0), ""
    if replaced := _replaced_by(module, tensor_name):
        return None, replaced
    return None, f"{UNKNOWN} {type(module).__name__}: name it with axis={{glob: dim}}, or give example="


def _replaced_by(module: nn.Module, tensor_name: str) -> str:
    """What of torch makes the layer's weight of this parameter in a hook; empty where nothing does."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and tensor_name == f"{hook._tensor_name}_orig":
            return f"pruned by torch.nn.utils.prune: call prune.remove(module, {hook._tensor_name!r}) first"
        if isinstance(hook, SpectralNorm) and tensor_name == f"{hook.name}_orig":
            return "spectral_norm of torch.nn.utils: use that of torch.nn.utils.parametrizations, after ow.sparsify"
    return ""


def known_output_axis(module: nn.Module, ndim: int, axis: Axis) -> tuple[Axis | None, str]:
    """The axis that the gradient of a layer's input sums over, by the reduction `axis` of its weight of `ndim` dims, or
    None and the reason why it is not known.

    Linear: the rows of the weight, dim 0. A convolution is a product for each position of its kernel, of outputs by
    inputs; the gradient sums over the outputs, dim 0, within each of its `groups`; in a transposed one that is dim 1.
    """
    if axis.flat:
        return None, "axis='kernel' groups the flattened weight, which has no output axis"
    if isinstance(module, nn.modules.conv._ConvNd) and axis == _conv_axis(module)[0]:
        return (Axis(1) if module.transposed else Axis(0, blocks=module.groups)), ""
    if axis.dim < ndim - 2:
        return None, f"no known output axis: its reduction axis is dim {axis.dim}, none of the last two"
    return Axis(2 * ndim - 3 - axis.dim), ""


def _conv_axis(module: nn.modules.conv._ConvNd) -> tuple[Axis | None, str]:
    if module.groups > 1 and module.in_channels == module.groups:
        return None, "depthwise: each output has one input channel"
    return (Axis(0, blocks=module.groups) if module.transposed else Axis(1)), ""


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D is a linear layer with a transposed weight (in, out). It is not imported to find out."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)
