"""A torch optimizer around another one."""

from __future__ import annotations

import torch


class Outer(torch.optim.Optimizer):
    """Like ZeroRedundancyOptimizer and Lookahead: a torch optimizer that lets another one do the step."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)
