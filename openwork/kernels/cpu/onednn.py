"""oneDNN's linear layer with a weight in oneDNN's own order: the fastest dense one there is on many CPUs.

torch compiles to it and has no public name for it. Where a version of torch lacks it, there is one baseline less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def prepacked_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor] | None:
    """A function that multiplies (rows, K) by a weight (O, K) ordered for that many rows; None where there is none."""
    try:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        product = torch.ops.mkldnn._linear_pointwise
        product(weight.new_zeros(rows, weight.shape[1]), ordered, bias, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):  # no such operator, or not for this dtype or CPU
        return None
    return lambda x: product(x, ordered, bias, "none", [], "")
