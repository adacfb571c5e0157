"""Save a sparse model compressed and load it again, bit for bit. The format is `docs/format.md`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from openwork.files.container import write
from openwork.files.foreign.compressed_tensors import Bitmask
from openwork.files.format import Sparse, check_free_names, check_little_endian, metadata
from openwork.files.header import Layout, Stored
from openwork.files.hub import local
from openwork.files.model_state import check_fits, check_same, fill, masked_by_name, patterns, tensors_by_name, ties
from openwork.files.packing import pack_weight, packed_shape
from openwork.files.reader import Contents, opened
from openwork.nm.pattern import Pattern
from openwork.training.masked import Masked
from openwork.training.parametrize import unwrap
from openwork.training.record import unfinished_weights
from openwork.training.selection import PatternChoice, Selection
from openwork.training.verify import NotSparse
from openwork.utils.deployed import check_not_folded
from openwork.utils.signals import without_interrupt

Model = TypeVar("Model", bound=nn.Module)
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `pattern` is None where it is stored dense; `bytes` are its values and indices in the file
    (0 for an alias, which is another name of `alias_of`); `density` is the share of its weights that have a slot."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pattern: Pattern | None
    bytes: int
    density: float = 1.0
    alias_of: str = ""


def save(
    model: nn.Module,
    path: Path,
    *,
    pattern: Selection | PatternChoice | None = None,
    example: Any = None,
) -> None:
    """Write every parameter and persistent buffer of a model, its N:M weights as values and indices. Atomic: the file
    at `path` is the old one or the new one at every moment.

    A sparsified model is saved as finalized, without being changed: the weights that its forward uses, at the patterns
    that were recorded, under dense names. A plain model is held to `pattern`, "2:4" or a `Selection`; without it the
    tightest N:M of each weight is found, and a warning says that it was inferred. Weights of unknown modules, such as
    experts, are dense in the file of a plain model, unless one `example` of its input shows along which axis they are
    summed, or `Selection(axis=...)` says it. Raises NotSparse with the weights
    that are denser, or whose method's schedule still runs; ValueError for a state that is not all tensors.

    >>> import tempfile
    >>> model = nn.Linear(4, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/net.safetensors", pattern="2:4")
    ...     load_state_dict(f"{folder}/net.safetensors")["weight"]
    tensor([[1., 0., 0., 2.]])
    """
    check_little_endian()
    model = unwrap(model)
    tensors, masked = tensors_by_name(model), masked_by_name(model)
    if running := unfinished_weights(model):
        raise NotSparse(
            {name: f"{what}; train on, or call ow.finalize, which prunes now" for name, what in running.items()}
        )
    aliases = ties(tensors, masked)
    chosen = patterns(model, masked, pattern, example)
    chosen = {aliases.get(name, name): place for name, place in chosen.items()}
    broken = {name: "the weight is gone: its module was replaced" for name in chosen if name not in tensors}
    if broken:
        raise NotSparse(broken)
    own = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    sparse = {name: Sparse.of(name, own[name], *chosen[name]) for name in chosen}
    check_free_names([*tensors], sparse)
    write(path, _layout(own, sparse), _contents(own, masked, sparse), metadata(sparse, aliases))


def _layout(tensors: Mapping[str, Tensor], sparse: Mapping[str, Sparse]) -> dict[str, Layout]:
    """Dtype and shape of each tensor of the file, by arithmetic alone."""
    layout: dict[str, Layout] = {}
    for name, tensor in tensors.items():
        if name in sparse:
            values_shape, index_bytes = packed_shape(tuple(tensor.shape), sparse[name].pattern, sparse[name].axis)
            layouts = ((tensor.dtype, values_shape), (torch.uint8, (index_bytes,)))
            layout |= zip(sparse[name].parts, layouts, strict=True)
        else:
            layout[name] = (tensor.dtype, tuple(tensor.shape))
    return layout


def _contents(
    tensors: Mapping[str, Tensor], masked: Mapping[str, Masked], sparse: Mapping[str, Sparse]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file, made when it is asked for. Raises NotSparse at the end, with every weight too dense."""
    broken, packed = {}, None
    for name, tensor in tensors.items():
        weight = tensor.detach()
        prune = name in masked and name in sparse and _pruned_alike(masked[name], weight, sparse[name])
        if name in masked and not prune:
            weight = masked[name].fold(tensor).detach()
        if name not in sparse:
            yield name, weight
            continue
        try:
            packed = pack_weight(weight, sparse[name].pattern, sparse[name].axis, prune=prune, into=packed)
        except ValueError as error:
            broken[name] = str(error)
            continue
        yield from zip(sparse[name].parts, packed, strict=True)
    if broken:
        raise NotSparse(broken)


def _pruned_alike(masked: Masked, weight: Tensor, sparse: Sparse) -> bool:
    """Whether packing can prune on the way what the model would fold."""
    return masked.folds_by_pruning(weight) and (masked.end.pattern, masked.end.axis) == (sparse.pattern, sparse.axis)


def load_state_dict(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The dense state dict in a file, on a device.

    `path` may also be a folder with model.openwork.safetensors in it, an http(s) address, and, with huggingface_hub
    installed, a repository of the Hugging Face Hub, "hf://owner/name" or "hf://owner/name@revision". Files and folders
    that compressed-tensors wrote as `sparse-24-bitmask` are read too. Raises ValueError where the bytes are not those
    that were written.

    >>> import tempfile
    >>> import openwork as ow
    >>> _ = ow.sparsify(model := nn.Linear(8, 2), "2:4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ow.save(model, f"{folder}/net.safetensors")
    ...     sorted(ow.load_state_dict(f"{folder}/net.safetensors"))
    ['bias', 'weight']
    """
    with local(path) as here, opened(here) as contents:
        state = {name: contents.read(name).to(device) for name in contents.tensors}
        return state | {alias: state[name] for alias, name in contents.aliases.items()}


def load(path: Path, into: Model) -> Model:
    """Fill a model from a file, in place and on its own device, and return it; `path` as in `load_state_dict`.

    `into` is a plain model, or a sparsified one, whose masks then agree with the file. Names, shapes and dtypes must
    be equal, and the whole file is read and checked before anything is written: after an error, or an interrupt from
    the keyboard, the model is untouched, or has all of the file. Memory holds the file, and of weights that are not
    linear layers' one decompressed.

    >>> import tempfile
    >>> import openwork as ow
    >>> _ = ow.project(model := nn.Linear(8, 2), "2:4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ow.save(model, f"{folder}/net.safetensors", pattern="2:4")
    ...     again = ow.load(f"{folder}/net.safetensors", into=nn.Linear(8, 2))
    >>> torch.equal(again.weight, model.weight)
    True
    """
    with local(path) as here, opened(here) as contents:
        inner = unwrap(into)
        check_not_folded(inner)
        targets, masked = tensors_by_name(inner), masked_by_name(inner)
        check_same(contents, targets, ties(targets, masked))
        contents = contents.in_memory()
        for name in contents.tensors:
            check_fits(name, contents, targets, masked)
        with without_interrupt():
            for name in contents.tensors:
                fill(name, contents, targets, masked)
        return into


def describe(path: Path) -> tuple[Entry, ...]:
    """What a file holds, from its header alone. Raises ValueError where the header is not as `docs/format.md` says."""
    with local(path) as here, opened(here) as contents:
        return _entries(contents)


def check(path: Path) -> tuple[Entry, ...]:
    """`describe`, after reading every tensor: raises ValueError for any flaw that the format can show."""
    with local(path) as here, opened(here) as contents:
        for name in contents.tensors:
            contents.check(name)
        return _entries(contents)


def _entries(contents: Contents) -> tuple[Entry, ...]:
    entries = {name: _entry(name, tensor, contents) for name, tensor in contents.tensors.items()}
    aliases = [
        Entry(alias, entries[name].shape, entries[name].dtype, entries[name].pattern, 0, entries[name].density, name)
        for alias, name in contents.aliases.items()
    ]
    return (*entries.values(), *aliases)


def _entry(name: str, tensor: Stored | Sparse | Bitmask, contents: Contents) -> Entry:
    if isinstance(tensor, Stored):
        return Entry(name, tensor.shape, tensor.dtype, None, tensor.stop - tensor.start)
    parts = [contents.stored[part] for part in tensor.parts]
    slots, weights = math.prod(parts[0].shape), math.prod(tensor.shape)
    size = sum(part.stop - part.start for part in parts)
    return Entry(name, tensor.shape, tensor.dtype, tensor.pattern, size, slots / weights)
