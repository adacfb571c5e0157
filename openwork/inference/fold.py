"""Fold batch normalization, and ReLU, into the layer before it, for inference: found by watching an example run.

A convolution or linear layer is followed by a normalization when the normalization's input is the layer's output and
nothing else reads that output. So any Python control flow is allowed, as long as it does not depend on the input.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwork.inference.folded import fold_away, fuse
from openwork.inference.layers import PACKED
from openwork.utils.example import run
from openwork.utils.torch_private import TorchDispatchMode, tree_leaves

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class _Pair:
    """A layer and the module that read its output: how many operators had read the output after it, and its dims."""

    layer: str
    follower: str
    output: int
    dims: int
    reads: int = 0


def fold_batch_norm(model: nn.Module, example: Any) -> list[str]:
    """Fold every batch normalization that directly follows a layer into it, in place, and return the layers' names.

    Only those in eval mode, which scale by what they recorded. Zeros stay zeros: a normalization scales whole outputs.
    """
    pairs = foldable(model, example)
    for layer, norm in pairs.values():
        had_bias = layer.bias is not None
        layer.weight, layer.bias = fuse(layer, layer.weight, norm)
        fold_away(model, layer, norm, had_bias)
    return [*pairs]


def foldable(model: nn.Module, example: Any) -> dict[str, tuple[Any, Any]]:
    """Layer name -> (layer, the batch normalization that follows it directly)."""
    found = {}
    for pair in _followed(model, example, _LAYERS, _NORMS):
        layer: Any = model.get_submodule(pair.layer)
        norm: Any = model.get_submodule(pair.follower)
        batched = layer.weight.ndim  # with other dims, the normalization's channels are not the layer's outputs
        if not norm.training and norm.running_mean is not None and pair.dims == batched:
            found[pair.layer] = (layer, norm)
    return found


def following_relu(model: nn.Module, example: Any) -> dict[str, str]:
    """Layer -> the `nn.ReLU` module that is its only reader and is used for nothing else."""
    layers = (*_LAYERS, *PACKED)
    return {pair.layer: pair.follower for pair in _followed(model, example, layers, (nn.ReLU,))}


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one wherever the model holds it: it may do so under several names."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def as_it_was_made(module: nn.Module) -> bool:
    """Whether calling a module does what its class says: no hooks but ours, no `forward` put into the instance."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    theirs = [each for each in hooks if not str(getattr(each, "__module__", "")).startswith("openwork.")]
    return not theirs and "forward" not in module.__dict__


def _followed(
    model: nn.Module, example: Any, layers: tuple[type[nn.Module], ...], followers: tuple[type[nn.Module], ...]
) -> list[_Pair]:
    """Layers and followers that meet in one place, each called once, with nothing else that reads what is between."""
    watcher = _Readers()
    calls: Counter[str] = Counter()
    made: dict[int, str] = {}
    pairs: dict[str, _Pair] = {}

    def layer_ran(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            calls[name] += 1
            made[id(output)] = name
            watcher.watch(output)

        return hook

    def follower_runs(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            calls[name] += 1
            layer = made.get(id(arguments[0])) if arguments else None
            if layer is not None:
                pairs[layer] = _Pair(layer, name, id(arguments[0]), arguments[0].ndim)

        return hook

    def follower_ran(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        layer = made.get(id(arguments[0])) if arguments else None
        if layer is not None:
            pairs[layer].reads = watcher.reads[id(arguments[0])]

    hooks = []
    for name, module in model.named_modules():
        if type(module) in layers and as_it_was_made(module):
            hooks.append(module.register_forward_hook(layer_ran(name)))
        elif type(module) in followers and as_it_was_made(module):
            hooks += [
                module.register_forward_pre_hook(follower_runs(name)),
                module.register_forward_hook(follower_ran),
            ]
    try:
        with torch.no_grad(), watcher:
            result = run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    held = watcher.held()  # while the caller's `result` lives
    del result
    single = [pair for pair in pairs.values() if calls[pair.layer] == calls[pair.follower] == 1 and pair.reads == 1]
    # What worked in place turned the output into its own: whoever reads that reads the same.
    in_place = {pair.layer for pair in single if getattr(model.get_submodule(pair.follower), "inplace", False)}
    return [p for p in single if p.layer in in_place or (watcher.reads[p.output] == 1 and p.output not in held)]


class _Readers(TorchDispatchMode):
    """Counts the operators that read each watched tensor. The tensors are kept, so that no other takes their id."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.reads: Counter[int] = Counter()

    def watch(self, output: Tensor) -> None:
        self.outputs.append(output)

    def held(self) -> set[int]:
        """Those that the model returned or keeps, by their id; call it once, at the end."""
        references = {id(output): weakref.ref(output) for output in self.outputs}
        self.outputs.clear()
        return {key for key, reference in references.items() if reference() is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory = {_memory(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)} - {0}
        for output in self.outputs:
            if output.untyped_storage().data_ptr() in memory:
                self.reads[id(output)] += 1
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; 0 for those that have no single place (sparse ones)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
