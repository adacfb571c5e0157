"""A batch normalization that was folded into the layer before it: gone from the computation, not from the state dict.

    y = (x - mean) / sqrt(variance + eps) * weight + bias

What stands in its place returns its input, and holds the numbers of a normalization that does next to nothing: weight
1, bias 0, variance 1 - eps, mean 0. Where the layer had no bias, the mean is minus the bias that folding gave it. So a
deployed model's state dict loads into the plain model, which computes the same; and the plain model's state dict loads
into a deployed one, which folds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_PAIRS = "_openwork_folded_pairs"


class FoldedNorm(nn.Identity):
    """In the place of a normalization, with its attributes, and tensors of its names, shapes and dtypes."""

    _openwork_folded = True

    def __init__(self, norm: Any):
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(norm).items() if name not in self.__dict__})
        for name, tensor in norm._parameters.items():
            value = None if tensor is None else torch.full_like(tensor, name == "weight", requires_grad=False)
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        for name, tensor in norm._buffers.items():
            self.register_buffer(name, tensor.clone() if name == "num_batches_tracked" else torch.zeros_like(tensor))
        self.running_var = torch.full_like(norm.running_var, 1 - norm.eps)

    def tensors(self) -> dict[str, Tensor]:
        named = {**self._parameters, **self._buffers}
        return {name: each.detach() for name, each in named.items() if each is not None}


@dataclass(frozen=True)
class _Pair:
    """A layer and the normalization after it, each by all names that it has in the model."""

    layers: tuple[str, ...]
    norms: tuple[str, ...]
    had_bias: bool


def fuse(layer: Any, weight: Tensor, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a layer with that weight and a batch normalization after it, in one; computed in float32 at
    least. They are new parameters: others may share the old ones."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        scale = (norm.running_var.to(exact) + norm.eps).rsqrt()
        shift = (
            -norm.running_mean.to(exact) if layer.bias is None else layer.bias.to(exact) - norm.running_mean.to(exact)
        )
        scale = scale if norm.weight is None else scale * norm.weight.to(exact)
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias.to(exact)
        scaled = weight.to(exact) * scale.view(-1, *[1] * (weight.ndim - 1)) + 0.0  # a scale below 0 makes -0.0
    learns = weight.requires_grad
    return nn.Parameter(scaled.to(weight.dtype), learns), nn.Parameter(shift.to(weight.dtype), learns)


def fold_away(model: Any, layer: Any, norm: Any, had_bias: bool) -> None:
    """Put a `FoldedNorm` in the place of a normalization, wherever the model holds it, and keep the state dict that of
    the model before."""
    names = {
        id(each): tuple(name for name, other in model.named_modules(remove_duplicate=False) if other is each)
        for each in (layer, norm)
    }
    pair = _Pair(names[id(layer)], names[id(norm)], had_bias)
    if _PAIRS not in model.__dict__:
        model.register_state_dict_post_hook(_write)
        model.register_load_state_dict_pre_hook(_read)
    setattr(model, _PAIRS, (*model.__dict__.get(_PAIRS, ()), pair))
    stands_in = FoldedNorm(norm)
    if not had_bias:
        stands_in.running_mean = -layer.bias.detach().to(norm.running_mean)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = stands_in


def _write(model: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """The bias of a layer that had none is the mean of its normalization."""
    for pair in getattr(model, _PAIRS):
        for name in () if pair.had_bias else pair.layers:
            state.pop(f"{prefix}{name}.bias", None)


def _read(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Fold what comes. A state without the normalization is one that was written folded."""
    for pair in getattr(model, _PAIRS):
        norm: Any = model.get_submodule(pair.norms[0])
        found = {key: state.get(f"{prefix}{pair.norms[0]}.{key}") for key in norm.tensors()}
        given = [name for name in pair.layers if f"{prefix}{name}.weight" in state]
        if given and all(found[key] is not None for key in found if key != "num_batches_tracked"):
            mean = _fold_state(norm, found, state, [prefix + name for name in given], pair.had_bias)
            stays = {**norm.tensors(), "running_mean": mean, "num_batches_tracked": found["num_batches_tracked"]}
        elif any(each is not None for each in found.values()):
            errors.append(
                f"{prefix}{pair.norms[0]} was folded into {pair.layers[0]}: a state that has one of them needs all "
                "tensors of both"
            )
            stays = norm.tensors()
        else:
            bias = state.get(f"{prefix}{pair.layers[0]}.bias")
            stays = norm.tensors() if bias is None or pair.had_bias else {**norm.tensors(), "running_mean": -bias}
        for name in pair.norms:
            state.update({f"{prefix}{name}.{key}": each for key, each in stays.items() if each is not None})


def _fold_state(norm: Any, found: dict[str, Any], state: dict[str, Any], layers: list[str], had_bias: bool) -> Tensor:
    """Weights and biases of the state, folded; returns the mean that is left to the normalization."""
    neutral = norm.tensors()
    same = all(
        torch.equal(found[key].to(neutral[key]), neutral[key])
        for key in ("weight", "bias", "running_var")
        if key in neutral
    )
    numbers = SimpleNamespace(**{"weight": None, "bias": None, **found}, eps=norm.eps)
    for layer in layers:
        weight, bias = state[layer + ".weight"], state.get(layer + ".bias") if had_bias else None
        if same:  # what `_write` wrote: exactly that
            shift = -found["running_mean"].to(weight)
            state[layer + ".bias"] = shift if bias is None else bias + shift
        else:
            folded = fuse(SimpleNamespace(bias=bias), weight, numbers)
            state[layer + ".weight"], state[layer + ".bias"] = (each.detach() for each in folded)
    mean = neutral["running_mean"]
    return torch.zeros_like(mean) if had_bias else -state[layers[0] + ".bias"].to(mean)
