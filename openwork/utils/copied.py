"""Copy a module, in whatever state a forward pass has left it."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. What a forward pass left in its modules, such as the weight that `torch.nn.utils.weight_norm`
    computes anew in each, is copied without its graph, where `copy.deepcopy` raises RuntimeError.

    >>> import torch
    >>> layer = nn.utils.spectral_norm(nn.Linear(2, 2))
    >>> _ = layer(torch.ones(1, 2))
    >>> layer.weight.requires_grad, copied(layer).weight.requires_grad
    (True, False)
    """
    left = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(each): each.detach().clone() for each in left if not each.is_leaf})
