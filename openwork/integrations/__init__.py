"""One object for each trainer: it attaches, records topology to the trainer's logger, verifies, saves.

`lightning`, `transformers` and `accelerate` import the package they are named after; this module imports none.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

import openwork as ow
from openwork.training.parametrize import unwrap


def projected_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict that `ow.finalize(model)` would have: dense names, exact zeros. The model keeps training; for a
    moment there is a second copy of it.

    >>> model = nn.Linear(4, 1)
    >>> _ = ow.sparsify(model, "2:4")
    >>> int((projected_state_dict(model)["weight"] != 0).sum()), int((model.state_dict()["weight"] != 0).sum())
    (2, 4)
    """
    return ow.finalize(copy.deepcopy(unwrap(model))).state_dict()
