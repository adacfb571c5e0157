"""Dense training that only watches the mask it *would* have: the reference curve for topology metrics.

forward        w~ = w
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from openwork.methods.method import Method, State
from openwork.methods.schedule import Phase


@dataclass(frozen=True)
class Dense(Method):
    """The dense twin: no zeros; `Topology` records how the magnitude mask would move.

    >>> import torch, openwork as ow
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    >>> _ = ow.sparsify(layer, "2:4", ow.Dense())
    >>> layer.weight.detach(), ow.masks(layer)["weight"]
    (tensor([[4., 3., 2., 1.]]), tensor([[ True,  True, False, False]]))
    """

    name: ClassVar[str] = "dense"
    sparse: ClassVar[bool] = False

    def forward(self, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        return weight
