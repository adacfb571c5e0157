"""What of a model goes into a file and comes back: its tensors by dense name, their patterns, their ties."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from openwork.files.container import CODES
from openwork.files.reader import Contents
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, too_dense
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import Masked, plain_name, sparse_weights, weight_name
from openwork.training.record import recorded_weights, sparsity_records
from openwork.training.select import HELD, decide
from openwork.training.selection import PatternChoice, Selection
from openwork.training.shared_class import AGE
from openwork.training.verify import tightest
from openwork.utils.deployed import check_not_deployed

Placed = tuple[Pattern, Axis]


def tensors_by_name(model: nn.Module, *, empty: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers by dense name, tied ones under each of their names; of masked weights the
    latent ones. Raises ValueError for what a file cannot hold, and, unless `empty`, for tensors without values."""
    check_not_deployed(model, "reading or writing a file")
    masked = masked_by_name(model)
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {weight_name(name) if weight_name(name) in masked else plain_name(name): each for name, each in named}
    names = [plain_name(name) for name in model.state_dict(keep_vars=True)]
    stored = {name + end for name, each in masked.items() if each.mask is not None for end in ("_mask", AGE)}
    unknown = [name for name in names if name not in own and name not in stored]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown[:3])} in the state dict of {type(model).__name__} is neither parameter nor buffer, "
            "and a file holds no other: remove it (extra state, state-dict hooks) and keep it elsewhere"
        )
    found = {name: own[name] for name in names if name in own}
    for name, each in found.items():
        if not (empty and each.is_meta):
            _check_plain_tensor(name, each)
    return found


def masked_by_name(model: nn.Module) -> dict[str, Masked]:
    """What masks each weight of a sparsified model, by the weight's dense name."""
    return {sparse.name: sparse.masked for sparse in sparse_weights(model)}


def ties(tensors: Mapping[str, Tensor], masked: Mapping[str, Masked]) -> dict[str, str]:
    """Each further name of a tensor -> its first name. A masked weight is tied to none: others see it unmasked."""
    first: dict[object, str] = {}
    found = {}
    for name, each in tensors.items():
        in_memory = each.numel() and not each.is_meta
        place = (each.device, each.data_ptr(), each.dtype, each.shape, each.stride()) if in_memory else id(each)
        if name not in masked and first.setdefault(place, name) != name:
            found[name] = first[place]
    return found


def patterns(
    model: nn.Module, masked: Mapping[str, Masked], choice: Selection | PatternChoice | None
) -> dict[str, Placed]:
    """The pattern and axis at which each weight is to be compressed: recorded, asked for, or inferred."""
    sparsified = bool(masked) or bool(sparsity_records(model))
    if sparsified and choice is not None:
        raise ValueError(
            "the model is sparsified and saved in the patterns that sparsify recorded; pattern= is for plain models"
        )
    if sparsified:
        own = {name: (each.pattern, each.axis) for name, each in masked.items() if each.method.sparse}
        return recorded_weights(model) | own
    selection = Selection.of(choice)
    if selection.pattern is None:
        return _inferred(model, selection)
    decided = decide(model, selection, dtypes=HELD)
    return {each.name: (each.pattern, each.axis) for each in decided if each.pattern and each.axis}


def _inferred(model: nn.Module, selection: Selection) -> dict[str, Placed]:
    decided = decide(model, replace(selection, pattern=Pattern(1, 1)), dtypes=HELD)
    found = {}
    for each in decided:
        if each.pattern and each.axis:
            tight, bits = tightest(each.weight, each.axis), 8 * each.weight.itemsize
            if tight.n * bits + tight.index_bits < tight.m * bits:
                found[each.name] = (tight, each.axis)
    counts = Counter(str(pattern) for pattern, _ in found.values())
    listed = ", ".join(f"{text} for {n}" for text, n in counts.items()) or "none is sparse"
    warnings.warn(
        f"no pattern was given: inferred from the weights ({listed}, of {len(decided)} weights of two dims or more); "
        "the others are stored dense",
        stacklevel=4,
    )
    return found


def check_same(contents: Contents, targets: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Raise ValueError unless file and model have the same names, shapes, dtypes and ties."""
    tensors, aliases = contents.tensors, contents.aliases
    names = tensors.keys() | aliases.keys()
    for what, missing in (("the model lacks", names - targets.keys()), ("the file lacks", targets.keys() - names)):
        if missing:
            raise ValueError(f"{what} {len(missing)} tensors, such as {', '.join(map(repr, sorted(missing)[:3]))}")
    for name, target in targets.items():
        each = tensors[aliases.get(name, name)]
        if (each.shape, each.dtype) != (tuple(target.shape), target.dtype):
            raise ValueError(
                f"{name} is {each.dtype} {each.shape} in the file, {target.dtype} {tuple(target.shape)} in the model: "
                "build the model of the file's shapes, and convert it with model.to(dtype)"
            )
        if any(step == 0 and length > 1 for step, length in zip(target.stride(), target.shape, strict=True)):
            raise ValueError(f"{name} of the model is expanded, so that it cannot be written: make it contiguous")
    for name, first in tied.items():
        if aliases.get(name, name) != aliases.get(first, first):
            raise ValueError(f"the model ties {name} to {first}, the file holds two tensors: untie them first")


def check_fits(names: Sequence[str], weight: Tensor, masked: Mapping[str, Masked]) -> None:
    """Raise ValueError where the masks of a sparsified model would change a weight of the file."""
    for name in names:
        each = masked.get(name)
        if each is None or not each.method.sparse:
            continue
        if problem := too_dense(weight, each.pattern, each.axis):
            raise ValueError(
                f"{name}: {problem}, and the model was sparsified at {each.pattern}: load into a plain model, or "
                "sparsify at the pattern of the file"
            )
        if each.output_axis and not torch.equal(apply_mask(weight, each.ranked(weight)), weight):
            raise ValueError(
                f"{name} is {each.pattern} along its reduction axis but not along its output axis, and the model was "
                "sparsified with transposable masks: load into a plain model, or sparsify with ow.SRSTE()"
            )


@torch.no_grad()
def fill(names: Sequence[str], weight: Tensor, targets: Mapping[str, Tensor], masked: Mapping[str, Masked]) -> None:
    """Write a tensor where a model keeps it, under each of its names; fixed masks are chosen anew, from the weight."""
    for name in names:
        targets[name].copy_(weight)
        if name in masked and masked[name].mask is not None:
            masked[name].choose_mask(targets[name])


def _check_plain_tensor(name: str, each: Tensor) -> None:
    if nn.parameter.is_lazy(each) or each.is_meta:
        raise ValueError(f"{name} has no values: initialize it (one forward, or model.to_empty) first")
    if each.layout != torch.strided or type(each.detach()) is not Tensor:
        raise ValueError(
            f"{name} is a {type(each.detach()).__name__} ({each.layout}); needed an ordinary tensor: gather sharded, "
            "dequantize quantized weights first"
        )
    if each.dtype not in CODES:
        raise ValueError(f"{name} is {each.dtype}; a file holds {', '.join(map(str, CODES))}")
