"""Weight normalization (Salimans and Kingma, 2016, arXiv:1602.07868): w = g v / |v|, of a direction v and lengths g.

The mask lies on the direction: where v is 0, w is 0, whatever the lengths. Torch keeps both in the place of the weight,
by `torch.nn.utils.parametrizations.weight_norm` or, the old way, by `torch.nn.utils.weight_norm`, in a hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from openwork.utils.names import join
from openwork.utils.torch_private import is_weight_norm

LENGTHS = "weight norm's lengths"
"""How the reason begins that lengths have no mask. It says nothing of the direction."""


class Factor(NamedTuple):
    """A parameter that torch has made of a layer's weight: `direction` or lengths, `weight` the name of the latter."""

    layer: nn.Module
    weight: str
    direction: bool


def factors(model: nn.Module) -> dict[tuple[int, str], Factor]:
    """The factors of all weights that are normalized, by the module that holds them (its id) and their name in it."""
    found: dict[tuple[int, str], Factor] = {}
    for layer in model.modules():
        for weight, holder, length, direction in _normalized(layer):
            found[id(holder), length] = Factor(layer, weight, False)
            found[id(holder), direction] = Factor(layer, weight, True)
    return found


def fold_weight_norm(model: nn.Module) -> dict[str, str]:
    """Make the weights that are normalized plain ones, in place. Returns the new name of each direction."""
    renamed = {}
    for name, layer in model.named_modules():
        for weight, holder, _, direction in list(_normalized(layer)):
            inside = "" if holder is layer else f"parametrizations.{weight}"
            renamed[join(join(name, inside), direction)] = join(name, weight)
            if holder is layer:
                remove_weight_norm(layer, weight)
            else:
                _remove_parametrization(layer, weight)
            with torch.no_grad():
                getattr(layer, weight).add_(0.0)  # a length below 0 makes -0.0, which files take for a weight
    return renamed


def _remove_parametrization(layer: Any, name: str) -> None:
    """What `parametrize.remove_parametrizations` does, but to this layer alone: copies share the class that torch makes
    of a parametrized one, and it takes the weight away from all of them."""
    values, trained = (
        getattr(layer, name).detach(),
        any(each.requires_grad for each in layer.parametrizations.parameters()),
    )
    parametrized, plain = type(layer), parametrize.type_before_parametrizations(layer)
    del layer.parametrizations[name]
    if len(layer.parametrizations):
        members = {
            key: each for key, each in vars(parametrized).items() if key not in (name, "__dict__", "__weakref__")
        }
        layer.__class__ = type(parametrized.__name__, (plain,), members)
    else:
        del layer.parametrizations
        layer.__class__ = plain
    layer.register_parameter(name, nn.Parameter(values.clone(), requires_grad=trained))
    for key, hook in [*layer._load_state_dict_pre_hooks.items()]:  # brings old names to those that are gone; no pickle
        if getattr(getattr(hook, "hook", hook), "__qualname__", "").startswith("weight_norm.<locals>"):
            del layer._load_state_dict_pre_hooks[key]


def _normalized(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str, str]]:
    """(weight, module that holds its factors, name of the lengths, name of the direction)."""
    parametrized: Any = dict(layer.named_children()).get("parametrizations")  # scripted ones have no dict
    steps: Any
    for weight, steps in parametrized.items() if isinstance(parametrized, nn.ModuleDict) else ():
        if len(steps) == 1 and is_weight_norm(steps[0]):
            yield weight, steps, "original0", "original1"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, layer, f"{hook.name}_g", f"{hook.name}_v"
