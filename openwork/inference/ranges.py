"""Which bytes stand for which numbers: one scale and one zero point for each activation, from batches of examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from openwork.inference.traced import Traced

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Of the range between the least and the largest number, those that are tried."""


@dataclass(frozen=True)
class Range:
    """A byte q stands for (q - zero) * scale, a number of float32, as kernels and files hold it.

    >>> Range.between(-100.0, 155.0)
    Range(scale=1.0, zero=100)
    """

    scale: float
    zero: int

    @classmethod
    def between(cls, least: float, most: float) -> Range:
        """All numbers between two, and 0 exactly."""
        least, most = min(least, 0.0), max(most, 0.0)
        scale = float(np.float32((most - least) / 255))
        if not scale > torch.finfo(torch.float32).tiny:  # nothing but zeros
            return cls(1.0, 0)
        return cls(scale, min(255, round(-least / scale)))


def ranges_of(graph: Traced, model: nn.Module, batches: Sequence[Any], nodes: Iterable[Node]) -> dict[Node, Range]:
    """The range of each node: of those that clip a share of what the batches show, the one that loses least, in
    squares. Nodes that are not finite, or not float32, get none."""
    wanted = set(nodes)
    extremes: dict[Node, tuple[float, float]] = {}

    def see(node: Node, value: Any) -> None:
        if node in wanted and isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel():
            least, most = map(float, value.aminmax())
            before = extremes.get(node, (0.0, 0.0))
            finite = math.isfinite(least) and math.isfinite(most)  # NaN is both
            extremes[node] = (min(before[0], least), max(before[1], most)) if finite else (-math.inf, math.inf)

    _each(graph, model, batches, see)
    finite = {node: each for node, each in extremes.items() if math.isfinite(each[1] - each[0])}
    tried = {node: [Range.between(s * low, s * high) for s in SHARES] for node, (low, high) in finite.items()}
    lost = {node: [0.0] * len(SHARES) for node in finite}

    def lose(node: Node, value: Any) -> None:
        for i, each in enumerate(tried.get(node, ())):
            whole = (value / each.scale + each.zero).round_().clamp_(0, 255)
            lost[node][i] += float((whole.sub_(each.zero).mul_(each.scale) - value).square_().sum())

    _each(graph, model, batches, lose)
    return {node: tried[node][min(range(len(SHARES)), key=lost[node].__getitem__)] for node in finite}


def _each(graph: Traced, model: nn.Module, batches: Sequence[Any], see: Any) -> None:
    with torch.no_grad():
        for batch in batches:
            graph.run(model, batch, see)
