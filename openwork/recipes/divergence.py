"""Where numbers stopped being finite: the batch, the weights, a gradient, the output of a layer, or the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openwork.utils.counted import counted


class Diverged(RuntimeError):
    """A loss, a weight or a score is not finite. `step` counts optimizer steps done before."""

    def __init__(self, step: int, text: str) -> None:
        super().__init__(text)
        self.step = step


def is_finite(value: Any) -> bool:
    """Whether all floating-point numbers in a tensor, or in anything that holds tensors, are finite."""
    return all(bool(local(t).isfinite().all()) for t in tensors_in(value) if t.is_floating_point() or t.is_complex())


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor: to look at the whole, all would have to."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in mappings, sequences and dataclasses of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _of_each(value.values())
    elif isinstance(value, list | tuple):
        yield from _of_each(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _of_each(getattr(value, field.name) for field in fields(value))


def _of_each(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from tensors_in(value)


def bad_weights(net: nn.Module) -> list[str]:
    """The names of parameters and buffers that are not finite, in the network's order."""
    return _bad([*net.named_parameters(), *net.named_buffers()])


def _bad(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [_plain(name) for name, tensor in named if not is_finite(tensor.detach())]


def _plain(name: str) -> str:
    """The name that a masked weight has in a dense network."""
    return name.removesuffix(".original").replace("parametrizations.", "")


def first_cause(net: nn.Module, batch: Any, forward: Callable[[], Any] | None) -> str:
    """What was not finite first, in words, where a loss is not. `forward` computes the loss once more; None where that
    cannot be done, as of a network in shards.

    Gradients are those of the step before, which the optimizer has used.
    """
    if not is_finite(batch):
        return "the batch holds numbers that are not finite: look at the data"
    parameters = _bad(net.named_parameters())
    if parameters:
        gradients = _bad((name, p.grad) for name, p in net.named_parameters() if p.grad is not None)
        last = gradients[-1:]  # backward goes from the last layer to the first
        cause = f"the gradient of {last[0]} was not finite in the step before, and so" if last else "after that step"
        count = counted(len(parameters), "parameter is", "parameters are")
        return f"{cause} the weight {parameters[0]} is not ({count} not)"
    if forward is not None and (name := _first_output(net, forward)) is not None:
        return f"the first output that is not finite is that of the layer {name}; all weights are finite"
    if buffers := _bad(net.named_buffers()):
        return f"the buffer {buffers[0]} is not finite, all weights are"
    return "all weights are finite" + ", and the outputs of all layers: it is the loss function itself" * bool(forward)


def _first_output(net: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first layer of a forward pass whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not found and not is_finite(output):
                found.append(f"{name} ({type(module).__name__.removeprefix('Parametrized')})")

        return hook

    leaves = [(name, m) for name, m in net.named_modules() if not any(True for _ in _layers_below(m))]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _layers_below(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module that are layers: not those that torch's parametrizations put there."""
    return (child for name, child in module.named_children() if name != "parametrizations")
