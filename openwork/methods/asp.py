"""ASP: prune a trained dense network once, by magnitude, then train it again with that mask (Mishra et al., 2021,
arXiv:2104.08378; NVIDIA's apex README gives the recipe: the whole dense recipe once more).

    mask           chosen once, from the weights that the model has when it is sparsified
    forward        w~ = w where kept, else +0     pruned weights get no gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.methods.method import Method, State
from openwork.methods.schedule import ONCE, Phase
from openwork.nm.masks import apply_mask


@dataclass(frozen=True)
class ASP(Method):
    """One-shot magnitude pruning with a fixed mask. Load the trained dense weights before `sparsify`. Source: Mishra et
    al., 2021, arXiv:2104.08378.

    >>> import torch, openwork as ow
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    >>> _ = ow.sparsify(layer, "2:4", ow.ASP())
    >>> layer(torch.ones(1, 4)).backward()
    >>> next(layer.parameters()).grad
    tensor([[1., 1., 0., 0.]])
    """

    name: ClassVar[str] = "asp"
    prunes_trained: ClassVar[bool] = True
    schedule = ONCE

    def backward(self, gradient: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        return apply_mask(gradient, mask)
