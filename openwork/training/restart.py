"""Where the training of a pruned network starts again, so that its mask is the solver's and can still change.

    w  = w where kept, else the dense weight cut to |w| <= 0.99 * the smallest kept magnitude of its group

At 0 a pruned weight would have to outgrow a kept one from nothing before the mask moves; at its dense value it would
often be kept at once. Cut this way it is not, in no dtype that a forward may round weights to: 0.99 is further from 1
than two roundings of bfloat16 reach. Groups in which the solver kept fewer than N stay as they are: whatever came in
there would be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from openwork.nm.groups import Axis, from_rows, to_rows
from openwork.training.masked import Masked
from openwork.training.parametrize import unwrap
from openwork.training.select import Candidate, check_has_values
from openwork.utils.counted import counted

_BELOW = 0.99


@torch.no_grad()
def restart(
    candidates: Mapping[str, Candidate], masked: Mapping[str, Masked], dense: nn.Module | Mapping[str, Tensor]
) -> None:
    """Give the pruned weights of the candidates the values that they start from, in place. Raises ValueError, before
    it changes any, where `dense` has none of a name or shape, where the method would not keep what the pruned network
    has kept, and where its mask cannot move."""
    for each in masked.values():
        if not each.method.sparse or each.schedule.refresh_every is None:
            raise ValueError(f"dense= with {each.method}, whose mask does not move: leave it out, or use ow.SRSTE()")
        if each.method.overrides("forward"):
            raise ValueError(
                f"dense= with {each.method}, which multiplies with something else than the pruned weight, so that the "
                "first forward would not be the pruned network's: use ow.SRSTE()"
            )
    values = _dense_values(candidates, masked, dense)
    for name, candidate in candidates.items():
        weight = candidate.weight.detach()
        weight.copy_(_started(weight, values[name].detach().to(weight), masked[name]))
        masked[name].belongs_to(candidate.weight)


def _dense_values(
    candidates: Mapping[str, Candidate], masked: Mapping[str, Masked], dense: nn.Module | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    check_has_values(list(candidates.values()))
    values = dict(unwrap(dense).state_dict() if isinstance(dense, nn.Module) else dense)
    if missing := [name for name in candidates if name not in values]:
        raise ValueError(f"dense has no {', '.join(missing[:3])}; it has {', '.join([*values][:3]) or 'nothing'}")
    for name, candidate in candidates.items():
        shape, found = tuple(candidate.weight.shape), tuple(values[name].shape)
        if shape != found:
            raise ValueError(f"dense has {name} of shape {found}, the pruned network {shape}; needed the same network")
        weight = candidate.weight.detach()
        lost = int(((weight != 0) & ~masked[name].ranked(weight, masked[name].end)).sum())
        if lost:
            raise ValueError(
                f"{name} is not pruned to {candidate.pattern} as {masked[name].method} chooses its masks, which would "
                f"drop {counted(lost, 'weight that is', 'weights that are')} not 0; needed the pruned network as the "
                "model, the one before as dense="
            )
    return values


def _started(weight: Tensor, dense: Tensor, masked: Masked) -> Tensor:
    """The weight to start from. Where masks lie along two axes, what is said of a group is said of a tile: of all masks
    of a tile, that of the kept weights has the largest sum once each of them is larger than each pruned one."""
    n, m, end = masked.end.pattern.n, masked.end.pattern.m, masked.end
    axes = [end.axis, *([end.output_axis] if end.output_axis else [])]
    kept = weight != 0
    full = _in_groups(kept, m, axes[:1], lambda groups: groups.sum(-1, keepdim=True) >= n)
    limit = torch.where(kept, weight.abs(), torch.inf).where(full, 0.0)
    limit = _in_groups(limit, m, axes, lambda groups: groups.amin(-1, keepdim=True), fill=torch.inf) * _BELOW
    started = torch.where(kept, weight, torch.minimum(torch.maximum(dense, -limit), limit))
    mask = masked.ranked(started, end)
    wrong = (kept & ~mask) | (mask & ~kept & (started != 0))
    if bool(wrong.any()):  # NaN; magnitudes so small that 0.99 of them rounds to themselves; approximate tiles
        wrong = _in_groups(wrong, m, axes, lambda groups: groups.any(-1, keepdim=True))
        started = torch.where(wrong, weight, started)
    return started


def _in_groups(
    values: Tensor, m: int, axes: list[Axis], function: Callable[[Tensor], Tensor], fill: float = 0.0
) -> Tensor:
    """What `function` makes of each group of m, at every place of the group, along one axis after the other; the last
    group of a row is filled up."""
    for axis in axes:
        rows = to_rows(values, axis)
        K = rows.shape[-1]
        groups = nn.functional.pad(rows, (0, -K % m), value=fill).unflatten(-1, (-1, m))
        spread = function(groups).expand_as(groups).flatten(-2)[..., :K]
        values = from_rows(spread, axis, tuple(values.shape))
    return values
