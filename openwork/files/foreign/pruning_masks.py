"""Read checkpoints of other sparsity libraries: plain names, and the masks apart.

| written by | dense or pruned weight | mask |
|---|---|---|
| torch.nn.utils.prune | `fc.weight_orig` | `fc.weight_mask` |
| torch.ao.pruning | `fc.parametrizations.weight.original` | in `sparsifier.state_dict()`, not in the model's |
| apex ASP | `fc.weight` | `fc.__weight_mma_mask` |
| NVIDIA ModelOpt | `fc.weight` | `fc._weight_mask` |
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from openwork.nm.masks import apply_mask
from openwork.training.parametrize import plain_name
from openwork.utils.caller import outside

# A key's own part (after its module's name) -> what stands at the weight's name, as a template for the tensor's name.
_WEIGHTS = (r"(\w+)_orig", r"parametrizations\.(\w+)\.original")
_MASKS = (r"(\w+)_mask", r"parametrizations\.(\w+)\.0\.mask", r"__(\w+)_mma_mask", r"_(weight)_mask")
_DROPPED = (r"__\w+_mma_pruned_p",)  # what ASP took away, kept for its restore_pruned_weights


def dense_state_dict(
    state: Mapping[str, Tensor], *, sparsifier: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights under the names of the plain model, zero where they were pruned, and the masks by weight (bool, True
    means kept) of a state dict that another library wrote.

    `sparsifier`: for torch.ao.pruning, `sparsifier.state_dict()`; the model's own state dict lacks the masks. Raises
    ValueError for a state dict that is plain already, a whole checkpoint, or parametrizations that are not masks.

    >>> import torch
    >>> from torch.nn.utils.prune import l1_unstructured
    >>> fc = l1_unstructured(torch.nn.Linear(2, 1, bias=False), "weight", amount=1)
    >>> weights, masks = dense_state_dict(fc.state_dict())
    >>> list(weights), int(masks["weight"].sum()), int((weights["weight"] != 0).sum())
    (['weight'], 1, 1)
    """
    state = _plain_keys(state)
    names = {key: _named(key, state) for key in state}
    weights = {name: state[key] for key, (kind, name) in names.items() if kind == "weight"}
    masks = {name: state[key].bool() for key, (kind, name) in names.items() if kind == "mask"}
    masks |= _sparsifier_masks(sparsifier)
    _check_masks(names, masks, sparsifier)
    for name, mask in masks.items():
        weights[name] = _masked(name, weights.get(name), mask)
    return weights, masks


def _plain_keys(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without what DDP and `torch.compile` put before the names."""
    other = [key for key, value in state.items() if not isinstance(value, Tensor) and not key.endswith("_extra_state")]
    if other:
        raise ValueError(
            f"{', '.join(map(repr, other[:4]))} hold no tensors: this is a whole checkpoint; hand over the "
            "state dict in it, such as checkpoint['state_dict'] or checkpoint['model']"
        )
    wrapped = all(key.startswith("module.") for key in state)
    return {plain_name(key.removeprefix("module.") if wrapped else key): value for key, value in state.items()}


def _named(key: str, state: Mapping[str, Tensor]) -> tuple[str, str]:
    """What a key holds, "weight", "mask" or "nothing", and the weight's name in the plain model."""
    module, own = _split(key)
    if any(re.fullmatch(form, own) for form in _DROPPED):
        return "nothing", key
    for form in _MASKS:
        match = re.fullmatch(form, own)
        # A plain model may have a buffer called attention_mask: a mask has a weight.
        if match and any(f"{module}{name}" in state for name in _weight_names(match[1])):
            return "mask", module + match[1]
    for form in _WEIGHTS:
        match = re.fullmatch(form, own)
        if match and (own.startswith("parametrizations.") or f"{module}{match[1]}_mask" in state):
            return "weight", module + match[1]
    if own.startswith("parametrizations.") or own.endswith("_orig"):
        raise ValueError(
            f"{key} belongs to a parametrization that is not a mask (weight norm, spectral norm, ...): remove it "
            "in the library that made it, and save again"
        )
    return "weight", key


def _split(key: str) -> tuple[str, str]:
    """The module's name with its dot, and the rest: ("fc.", "parametrizations.weight.original")."""
    module, dot, own = key.rpartition("parametrizations.")
    if dot:
        return module, dot + own
    module, dot, own = key.rpartition(".")
    return module + dot, own


def _weight_names(tensor: str) -> tuple[str, ...]:
    return f"{tensor}_orig", f"parametrizations.{tensor}.original", tensor


def _sparsifier_masks(sparsifier: Mapping[str, Any] | None) -> dict[str, Tensor]:
    entries = sparsifier["state"] if sparsifier else {}
    return {name: entry["mask"].bool() for name, entry in entries.items()}


def _check_masks(
    names: Mapping[str, tuple[str, str]], masks: Mapping[str, Tensor], sparsifier: Mapping[str, Any] | None
) -> None:
    bare = [name for key, (_, name) in names.items() if key.endswith(".original") and name not in masks]
    if bare and sparsifier is None:
        raise ValueError(
            f"no mask is stored for {', '.join(bare[:3])}: torch.ao.pruning keeps it in the sparsifier; pass "
            "sparsifier=sparsifier.state_dict(). If that is lost, sparsifier={'state': {}} takes the dense weights, "
            "and ow.project chooses masks by magnitude"
        )
    if not masks and not bare:
        raise ValueError(
            "no mask of a library that is known here: it is a plain state dict; load it unmodified, and "
            "ow.verify(model, pattern=...) says whether it is sparse"
        )
    if masks and all(bool(mask.all()) for mask in masks.values()):
        warnings.warn("every mask keeps every weight: the checkpoint was written before pruning", stacklevel=outside())


def _masked(name: str, weight: Tensor | None, mask: Tensor) -> Tensor:
    if weight is None or weight.shape != mask.shape:
        found = "no weight" if weight is None else f"a weight of shape {tuple(weight.shape)}"
        raise ValueError(
            f"{name}: found {found} for a mask of shape {tuple(mask.shape)}; is it the mask of this model?"
        )
    return apply_mask(weight, mask.to(weight.device))
