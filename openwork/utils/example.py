"""Call a model with an example of its input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


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


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and afterwards every training flag and random state as it was."""
    flags = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
