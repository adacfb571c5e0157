"""Tell a deployed model from others, without importing what deploys."""

from __future__ import annotations

from torch import nn

DEPLOYED = "_openwork_deployed"
"""The attribute that marks the class of a deployed layer."""


def check_not_deployed(model: nn.Module, verb: str) -> None:
    """Refuse a deployed model where its weights must be at hand, and say what to do instead."""
    layers = [name for name, module in model.named_modules() if hasattr(module, DEPLOYED)]
    if layers:
        raise ValueError(
            f"{verb}: {len(layers)} layers are deployed ({layers[0]}, ...), their weights packed for this hardware; "
            "do it with the model that was deployed, or load this one's state dict into a plain model"
        )
