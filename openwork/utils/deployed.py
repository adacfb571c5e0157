"""Tell a deployed model from others, without importing what deploys."""

from __future__ import annotations

from torch import nn

from openwork.utils.counted import counted

DEPLOYED = "_openwork_deployed"
"""The attribute that marks the class of a deployed layer."""


def check_not_folded(model: nn.Module) -> None:
    """Refuse to write into single tensors of a model whose batch normalizations were folded: a state dict folds anew
    what it brings."""
    folded = [name for name, module in model.named_modules() if hasattr(module, "_openwork_folded")]
    if folded:
        what = counted(len(folded), "batch normalization of the model is", "batch normalizations of the model are")
        raise ValueError(
            f"reading a file: {what} folded ({folded[0]}, ...): load the file into the plain model and deploy "
            "that, or model.load_state_dict(ow.load_state_dict(file))"
        )


def check_not_deployed(model: nn.Module, verb: str) -> None:
    """Refuse a deployed model where its weights must be at hand, and say what to do instead."""
    layers = [name for name, module in model.named_modules() if hasattr(module, DEPLOYED)]
    if layers:
        raise ValueError(
            f"{verb}: {counted(len(layers), 'layer is', 'layers are')} deployed ({layers[0]}, ...), their weights "
            "packed for this hardware; do it with the model that was deployed, or load this "
            "one's state dict into a plain model"
        )
