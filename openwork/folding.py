"""Fold batch normalization, and ReLU, into the layer before it, for inference: found by watching an example run.

A convolution or linear layer is followed by a normalization when the normalization's input is the layer's output and
nothing else reads that output. So any Python control flow is allowed, as long as it does not depend on the input.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openwork.gemms import run

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(model: nn.Module, example: Any) -> list[str]:
    """Fold every batch normalization that directly follows a layer into it, in place, and return the layers' names.

    The model must be in eval mode. Zeros stay zeros: a normalization scales whole outputs.
    """
    pairs = foldable(model, example)
    for name, (layer, norm_name, norm) in pairs.items():
        folded = copy.deepcopy(layer)
        folded.weight, folded.bias = fuse(layer, layer.weight, norm)
        _replace(model, name, folded)
        _replace(model, norm_name, nn.Identity())
    return [*pairs]


def foldable(model: nn.Module, example: Any) -> dict[str, tuple[Any, str, Any]]:
    """Layer name -> (layer, name of the batch normalization that follows it directly, the normalization)."""
    return {name: each for name, each in _followed(model, example, _NORMS).items() if each[2].running_mean is not None}


def fuse(layer: Any, weight: Tensor, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a layer with that weight and a batch normalization after it, in one."""
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    offset = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    both: Any = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    return both(weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, scale, offset)


def following_relu(model: nn.Module, example: Any) -> dict[str, str]:
    """Layer -> the `nn.ReLU` module that is its only reader and is used for nothing else."""
    return {name: relu for name, (_, relu, _) in _followed(model, example, (nn.ReLU,)).items()}


def _followed(
    model: nn.Module, example: Any, followers: tuple[type[nn.Module], ...]
) -> dict[str, tuple[nn.Module, str, Any]]:
    """Layer name -> (layer, follower's name, follower), for pairs that meet in one place and are each called once."""
    watcher = _Readers()
    calls: Counter[nn.Module] = Counter()
    made: dict[int, str] = {}
    read: dict[str, tuple[nn.Module, str, Any]] = {}
    hooks = []

    def other_dim(layer: str, output: Tensor) -> bool:
        """Whether a normalization, which has dim 1 for channels, has another one than the layer."""
        weight: Any = model.get_submodule(layer).weight
        return output.ndim != weight.ndim

    def after(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            calls[module] += 1
            if isinstance(output, Tensor):
                made[id(output)] = name
                watcher.watch(output)

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            calls[module] += 1
            layer = made.get(id(arguments[0])) if arguments else None
            if layer is not None and not (isinstance(module, _NORMS) and other_dim(layer, arguments[0])):
                read[layer] = (model.get_submodule(layer), name, module)

        return hook

    for name, module in model.named_modules():
        if type(module) in _LAYERS or type(module).__name__ in ("SparseLinear", "SparseConv2d"):
            hooks.append(module.register_forward_hook(after(name)))
        elif type(module) in followers:
            hooks.append(module.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad(), watcher:
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    once = {id(output): watcher.reads[id(output)] == 1 for output in watcher.outputs}
    layers = {layer: each for output, layer in made.items() if once[output] and (each := read.get(layer))}
    return {name: each for name, each in layers.items() if calls[each[0]] == 1 and calls[each[2]] == 1}


class _Readers(TorchDispatchMode):
    """Counts the operators that read each watched tensor. The tensors are kept, so that no other takes their id."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.reads: Counter[int] = Counter()

    def watch(self, output: Tensor) -> None:
        self.outputs.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for output in self.outputs:
            if output.untyped_storage().data_ptr() in memory:
                self.reads[id(output)] += 1
        return func(*args, **(kwargs or {}))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
