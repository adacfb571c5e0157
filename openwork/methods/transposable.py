"""Transposable SR-STE: SR-STE whose masks are N:M along both axes of each product, and stay for some steps (Hu et al.,
ICML 2024, arXiv:2404.01847; transposable masks: Hubara et al., 2021, arXiv:2102.08124).

    mask           of every M x M tile of the weight, N in each row and each column, with the largest sum of |w|;
                   chosen by `sparsify`, and anew after every `refresh_every` optimizer steps
    forward        w~ = w where kept, else +0     gradient of the loss at w~ flows to all of w
    before a step  g  = g + decay * w where pruned, once, after unscaling, reducing, accumulating, clipping

y = x w~' sums over a row of w~, dx = dy w~ over a column: so both products can run sparse
(`openwork.accelerate`). The third, dw = dy' x, has no sparse operand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from openwork.methods.method import Method
from openwork.methods.schedule import EVERY_FORWARD, Schedule, every_forward
from openwork.methods.schedules import Ramp
from openwork.ops.masks import check_rate


@dataclass(frozen=True, repr=False)
class TransposableSRSTE(Method):
    """SR-STE with masks that are N:M in the transposed weight too, chosen anew every `refresh_every` steps. Source: Hu
    et al., ICML 2024, arXiv:2404.01847.

    Defaults are those of Hu et al.: masks every 40 steps; decays between 6e-5 and 2e-4, by the size of the network. As
    in SR-STE, short runs want more. Masks and the steps since they were chosen are part of the state dict. Hu et al.
    train dense in the end: `schedule=ow.DenseTail(steps)`.

    >>> import torch, openwork as ow
    >>> _ = ow.sparsify(layer := torch.nn.Linear(8, 8), "2:4", ow.TransposableSRSTE())
    >>> mask = ow.masks(layer)["weight"]
    >>> mask.view(-1, 4).sum(1).unique(), mask.T.reshape(-1, 4).sum(1).unique()
    (tensor([2]), tensor([2]))
    """

    decay: float = 2e-4
    refresh_every: int = 40
    schedule: Schedule = field(default_factory=every_forward, kw_only=True)

    name: ClassVar[str] = "transposable-sr-ste"
    transposable: ClassVar[bool] = True
    refused_schedules: ClassVar[tuple[type[Schedule], ...]] = (Ramp,)  # a tile has no groups of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("decay", self.decay)
        if type(self.refresh_every) is not int or self.refresh_every < 1:
            raise ValueError(
                f"refresh_every={self.refresh_every!r}; needed the number of steps that masks stay, 1 or more"
            )
        object.__setattr__(self, "schedule", replace(self.schedule, refresh_every=self.refresh_every))

    def __repr__(self) -> str:
        given = replace(self.schedule, refresh_every=0)
        more = "" if given == EVERY_FORWARD else f", schedule={given}"
        return f"{type(self).__qualname__}(decay={self.decay}, refresh_every={self.refresh_every}{more})"
