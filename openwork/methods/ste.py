"""STE: the straight-through estimator with a mask that follows the weights (Bengio et al., 2013, arXiv:1308.3432,
for N:M in Zhou et al., ICLR 2021, arXiv:2102.04010, the baseline there).

    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from openwork.methods.method import Method
from openwork.methods.schedule import Schedule, every_forward


@dataclass(frozen=True, repr=False)
class STE(Method):
    """Train from scratch; pruned weights keep learning and may come back. The baseline of Zhou et al., ICLR 2021,
    arXiv:2102.04010.

    `schedule`: when masks are chosen, and what is in force before the last pattern is.

    >>> import torch, openwork as ow
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    >>> _ = ow.sparsify(layer, "2:4", ow.STE())
    >>> (output := layer(torch.ones(1, 4))).backward()
    >>> output.item(), next(layer.parameters()).grad
    (7.0, tensor([[1., 1., 1., 1.]]))
    """

    schedule: Schedule = field(default_factory=every_forward, kw_only=True)

    name: ClassVar[str] = "ste"
