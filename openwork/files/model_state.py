"""What of a model goes into a file and comes back: its tensors by dense name, their patterns, their ties."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from openwork.files.header import CODES
from openwork.files.reader import Contents
from openwork.kernels.cpu.counts import too_dense
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask
from openwork.nm.pattern import Pattern
from openwork.training.masked import Masked
from openwork.training.parametrize import plain_name, sparse_weights, weight_name
from openwork.training.record import recorded_weights, sparsity_records
from openwork.training.selection import PatternChoice, Selection
from openwork.training.verify import decide_held, tightest
from openwork.utils.caller import outside
from openwork.utils.counted import counted
from openwork.utils.deployed import check_not_deployed

Placed = tuple[Pattern, Axis]


def tensors_by_name(model: nn.Module, *, empty: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers by dense name, tied ones under each of their names; of masked weights the
    latent ones. Raises ValueError for what a file cannot hold, and, unless `empty`, for tensors without values."""
    check_not_deployed(model, "reading or writing a file")
    masked = masked_by_name(model)
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {weight_name(name) if weight_name(name) in masked else plain_name(name): tensor for name, tensor in named}
    names = [plain_name(name) for name in model.state_dict(keep_vars=True)]
    stored = {f"{name}_{key}" for name, masking in masked.items() for key in masking.saved()}
    unknown = [name for name in names if name not in own and name not in stored]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown[:3])} in the state dict of {type(model).__name__} is neither parameter nor buffer, "
            "and a file holds no other: remove it (extra state, state-dict hooks) and keep it elsewhere"
        )
    tensors = {name: own[name] for name in names if name in own}
    for name, tensor in tensors.items():
        if not (empty and tensor.is_meta):
            _check_plain_tensor(name, tensor)
    return tensors


def masked_by_name(model: nn.Module) -> dict[str, Masked]:
    """What masks each weight of a sparsified model, by the weight's dense name, under each that it has."""
    return {sparse.name: sparse.masked for sparse in sparse_weights(model, every_name=True)}


def ties(tensors: Mapping[str, Tensor], masked: Mapping[str, Masked]) -> dict[str, str]:
    """Each further name of a tensor -> its first name. A masked weight is tied to the names of the same module alone:
    others see it unmasked, or by another mask."""
    first: dict[object, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        in_memory = tensor.numel() and not tensor.is_meta
        place = (
            (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if in_memory else id(tensor)
        )
        seen = first.setdefault((place, id(masked.get(name))), name)
        if seen != name:
            aliases[name] = seen
    return aliases


def patterns(
    model: nn.Module, masked: Mapping[str, Masked], choice: Selection | PatternChoice | None, example: Any = None
) -> dict[str, Placed]:
    """The pattern and axis at which each weight is to be compressed: recorded, asked for, or inferred. `example`: as of
    `verify`."""
    sparsified = bool(masked) or bool(sparsity_records(model))
    if sparsified and choice is not None:
        raise ValueError(
            "the model is sparsified and saved in the patterns that sparsify recorded; pattern= is for plain models"
        )
    if sparsified:
        own = {
            name: (masking.end.pattern, masking.end.axis)
            for name, masking in masked.items()
            if masking.method.ends_sparse
        }
        return recorded_weights(model) | own
    selection = Selection.of(choice)
    if selection.pattern is None:
        return _inferred(model, selection, example)
    decided = decide_held(model, selection, example)
    return {weight.name: (weight.pattern, weight.axis) for weight in decided if weight.pattern and weight.axis}


def _inferred(model: nn.Module, selection: Selection, example: Any) -> dict[str, Placed]:
    decided = decide_held(model, replace(selection, pattern=Pattern(1, 1)), example)
    places = {}
    for candidate in decided:
        if candidate.pattern and candidate.axis:
            tight, bits = tightest(candidate.weight, candidate.axis), 8 * candidate.weight.itemsize
            if tight.n * bits + tight.index_bits < tight.m * bits:
                places[candidate.name] = (tight, candidate.axis)
    counts = Counter(str(pattern) for pattern, _ in places.values())
    listed = ", ".join(f"{text} for {n}" for text, n in counts.items()) or "none is sparse"
    warnings.warn(
        f"no pattern was given: inferred from the weights ({listed}, of {counted(len(decided), 'weight')} of two dims "
        "or more); the others are stored dense",
        stacklevel=outside(),
    )
    return places


def check_same(contents: Contents, targets: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Raise ValueError unless file and model have the same names, shapes, dtypes and ties."""
    tensors, aliases = contents.tensors, contents.aliases
    names = tensors.keys() | aliases.keys()
    for what, missing in (("the model lacks", names - targets.keys()), ("the file lacks", targets.keys() - names)):
        if missing:
            raise ValueError(
                f"{what} {counted(len(missing), 'tensor')}, such as {', '.join(map(repr, sorted(missing)[:3]))}"
            )
    for name, target in targets.items():
        stored = tensors[aliases.get(name, name)]
        if stored.shape != (shape := tuple(target.shape)):
            raise ValueError(
                f"{name} is {stored.shape} in the file, {shape} in the model: build it of the file's shapes"
            )
        if stored.dtype != target.dtype:
            short = str(stored.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}: the file is {stored.dtype}, the model {target.dtype}: load into a {short} model and convert "
                f"afterwards, or save the model in {str(target.dtype).removeprefix('torch.')}"
            )
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} of the model was made in inference_mode and cannot be changed: make it anew")
        if any(step == 0 and length > 1 for step, length in zip(target.stride(), target.shape, strict=True)):
            raise ValueError(f"{name} of the model is expanded, so that it cannot be written: make it contiguous")
    for name, first in tied.items():
        if aliases.get(name, name) != aliases.get(first, first):
            raise ValueError(f"the model ties {name} to {first}, the file holds two tensors: untie them first")


def check_fits(first: str, contents: Contents, targets: Mapping[str, Tensor], masked: Mapping[str, Masked]) -> None:
    """Raise ValueError where the masks of a sparsified model would change a tensor of the file, and MemoryError where
    there is no room to unpack it."""
    packed = contents.sparse.get(first)
    placed = packed and (packed.pattern, packed.axis)
    if packed and not all(packed.unpacks_in_place(targets[name]) for name in contents.names_of(first)):
        contents.read(first)
    for name in contents.names_of(first):
        masking = masked.get(name)
        if masking is None or not masking.method.ends_sparse:
            continue
        end = masking.end
        itself = not masking.method.overrides("forward", "fold")
        if itself and placed == (end.pattern, end.axis) and not end.output_axis:
            continue  # it holds no more than the slots of that pattern
        weight = contents.read(first)
        if problem := too_dense(weight, end.pattern, end.axis):
            raise ValueError(
                f"{name}: {problem}, and the model was sparsified at {end.pattern}: load into a plain model, or "
                "sparsify at the pattern of the file"
            )
        if end.output_axis and not torch.equal(apply_mask(weight, masking.ranked(weight, end)), weight):
            raise ValueError(
                f"{name} is {end.pattern} along its reduction axis but not along its output axis, and the model was "
                "sparsified with transposable masks: load into a plain model, or sparsify with ow.SRSTE()"
            )
        if not itself and not _is_itself(weight, masking):
            raise ValueError(
                f"{name}: {masking.method} would multiply with something else than the finished weight of the file: "
                "load into a plain model, or sparsify with ow.SRSTE()"
            )


def _is_itself(weight: Tensor, masking: Masked) -> bool:
    """Whether a method makes of a finished weight that weight."""
    state = masking.method.state(weight, masking.end)
    mask = masking.ranked(weight, masking.end, state)
    folded = masking.method.fold(weight, mask, masking.end, state)
    return torch.allclose(folded, weight, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def fill(first: str, contents: Contents, targets: Mapping[str, Tensor], masked: Mapping[str, Masked]) -> None:
    """Write a tensor where a model keeps it, under each of its names; what a mask stores is made anew, from the
    weight."""
    for name in contents.names_of(first):
        contents.read_into(first, targets[name])
        if name in masked:
            masked[name].follow(targets[name])


def _check_plain_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise ValueError(f"{name} has no values: initialize it (one forward, or model.to_empty) first")
    if tensor.layout != torch.strided or type(tensor.detach()) is not Tensor:
        raise ValueError(
            f"{name} is a {type(tensor.detach()).__name__} ({tensor.layout}); needed an ordinary tensor: gather "
            "sharded, dequantize quantized weights first"
        )
    if tensor.dtype not in CODES:
        raise ValueError(f"{name} is {tensor.dtype}; a file holds {', '.join(map(str, CODES))}")
