"""SR-STE: the sparse-refined straight-through estimator (Zhou et al., ICLR 2021, arXiv:2102.04010).

    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
    before a step  g  = g + decay * w where pruned, once, after unscaling, reducing, accumulating, clipping

The authors add the regularizer inside autograd, where a loss scale divides it and accumulation or reuse of a weight
multiplies it. Here `attach` adds it, outside autograd.

Under Adam the gradient is divided by the root of its second moment, and the regularizer with it. `decoupled` keeps it
out of the moments, as AdamW does with weight decay (AST, Huang et al., AAAI 2025, does so):

    in a step      w  = w - lr * decay * w where pruned, then the optimizer's update by g alone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from openwork.methods.method import Method
from openwork.methods.schedule import Schedule, every_forward
from openwork.ops.masks import check_rate


@dataclass(frozen=True, repr=False)
class SRSTE(Method):
    """STE that shrinks the pruned weights, so that the mask converges. `decay` 0 is STE. Source: Zhou et al., ICLR
    2021, arXiv:2102.04010.

    The default is the authors' for 600,000 steps of ImageNet. Where decay times the summed learning rate is far
    below 1 it has no effect, so short runs want more: 0.02 suited a thousand steps (docs/topology.md). `decoupled`: the
    decay does not pass through the optimizer's moments; `docs/methods.md` says what to choose under Adam.

    >>> import torch, openwork as ow
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    >>> _ = ow.sparsify(layer, "2:4", ow.SRSTE(decay=0.5))
    >>> _ = ow.attach(optimizer := torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    >>> (0 * layer(torch.ones(1, 4))).backward()
    >>> optimizer.step()
    >>> next(layer.parameters()).data
    tensor([[4.0000, 3.0000, 1.9000, 0.9500]])
    """

    decay: float = 2e-4
    decoupled: bool = field(default=False, kw_only=True)
    schedule: Schedule = field(default_factory=every_forward, kw_only=True)

    name: ClassVar[str] = "sr-ste"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("decay", self.decay)
