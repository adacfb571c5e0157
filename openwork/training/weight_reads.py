"""Who reads a masked weight, and what it gets: the computed tensor, or one whose writes go to the dense weight."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import Tensor, nn

from openwork.training.computed_weight import ComputedWeight, Source, itself
from openwork.training.dtensor import is_sharded
from openwork.utils.torch_private import is_traced, is_transformed

_MAKERS = ("torch.nn.utils.parametrize", "torch.nn.utils.weight_norm")
"""Modules of torch that make a layer's weight of others."""
_REPLACES = {
    ("torch.nn.utils.weight_norm", "apply"): "weight_norm",
    ("torch.nn.utils.prune", "apply"): "pruning",
}
"""What of torch puts other tensors in the place of a weight, by the module and function that reads it then."""


def handed_out(weight: Tensor, module: nn.Module, name: str, reader: FrameType) -> Tensor:
    """What code gets that reads a masked weight: the weight itself where it only multiplies with it, or is traced; else
    a `ComputedWeight`. `reader` is the code's frame."""
    where = reader.f_globals.get("__name__", "")
    if (where, reader.f_code.co_name) in _REPLACES:
        raise RuntimeError(
            f"{_REPLACES[where, reader.f_code.co_name]} of {Source(module, name, weight, weight)}: call it before "
            "ow.sparsify, whose report says what it leaves alone, or after ow.finalize; nothing was changed"
        )
    if where in _MAKERS:
        return _read_by_a_maker(weight, module, name, reader)
    multiplies = where.startswith("torch.nn.modules.") and "reset_parameters" not in reader.f_code.co_name
    if multiplies or where.startswith("openwork.") or not (type(weight) is Tensor or is_sharded(weight)):
        return weight
    if is_traced() or is_transformed(weight):
        return weight
    parametrizations: Any = module.parametrizations
    dense = parametrizations[name].original
    if is_transformed(dense):
        return weight
    return ComputedWeight.of(Source(module, name, dense, weight), itself, weight)


def _read_by_a_maker(weight: Tensor, module: nn.Module, name: str, reader: FrameType) -> Tensor:
    """What torch's parametrizations and weight norm get: they compute with it, and may not take it away."""
    frame: FrameType | None = reader
    while frame and frame.f_globals.get("__name__", "").startswith("torch.nn."):
        if frame.f_code.co_name in ("remove_parametrizations", "remove_weight_norm"):
            raise RuntimeError(
                f"{frame.f_code.co_name} takes away {Source(module, name, weight, weight)}: call ow.finalize(model) "
                "first, which makes the layers plain; nothing was changed"
            )
        frame = frame.f_back
    return weight
