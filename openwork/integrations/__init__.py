"""One object for each trainer: it attaches, records topology to the trainer's logger, verifies, saves.

`lightning`, `hf_trainer` and `hf_accelerate` import Lightning, transformers and Accelerate; this module imports none of
them, and prepares the torchvision that they import.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import openwork as ow
from openwork.training.parametrize import unwrap
from openwork.utils.copied import copied
from openwork.utils.torchvision_compat import prepare_torchvision

prepare_torchvision()


def projected_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict that `ow.finalize(model)` would have: dense names, exact zeros. The model keeps training; for a
    moment there is a second copy of it.

    >>> model = nn.Linear(4, 1)
    >>> _ = ow.sparsify(model, "2:4")
    >>> int((projected_state_dict(model)["weight"] != 0).sum()), int((model.state_dict()["weight"] != 0).sum())
    (2, 4)
    """
    return ow.finalize(copied(unwrap(model))).state_dict()
