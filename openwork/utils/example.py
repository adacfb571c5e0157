"""Call a model with an example of its input."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openwork.utils.torch_private import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def run(model: nn.Module, example: Any) -> Any:
    """Call the model: a tuple is its arguments, a mapping its keyword arguments, anything else its one argument."""
    if isinstance(example, Call):
        return model(*example.args, **example.kwargs)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments, the latter in the order of the model's signature."""
    if isinstance(example, Call):
        return example.args, dict(example.kwargs)
    if isinstance(example, Mapping):
        order = list(inspect.signature(model.forward).parameters)
        rank = {name: order.index(name) if name in order else len(order) for name in example}
        return (), {name: example[name] for name in sorted(example, key=rank.__getitem__)}
    return (example if isinstance(example, tuple) else (example,)), {}


def tensors_of(example: Any) -> list[Tensor]:
    """The tensors in an example, in order."""
    return [leaf for leaf in tree_leaves(_plain(example)) if isinstance(leaf, Tensor)]


def mapped(example: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The example with what `function` makes of each of its tensors."""
    if isinstance(example, Call):
        return Call(*tree_map_only(Tensor, function, _plain(example)))
    return tree_map_only(Tensor, function, _plain(example))


def cloned(example: Any) -> Any:
    """The example with copies of its tensors, which a model may write to."""
    return mapped(example, Tensor.clone)


def _plain(example: Any) -> Any:
    """Made of tuples and dicts: what a tokenizer returns is a mapping that torch does not look into."""
    if isinstance(example, Call):
        return example.args, dict(example.kwargs)
    return dict(example) if isinstance(example, Mapping) else example


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and afterwards every training flag and random state as it was. Casts of weights that
    autocast keeps are those of this forward alone."""
    flags = {module: module.training for module in model.modules()}
    torch.clear_autocast_cache()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        torch.clear_autocast_cache()
