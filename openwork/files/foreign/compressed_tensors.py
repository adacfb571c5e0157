"""Files of compressed-tensors' format `sparse-24-bitmask`, whose authors took its reader away in 2026 (0.15.0).

A weight `X.weight` of R rows and C columns lies in three tensors of an ordinary safetensors file:

    X.compressed  (R, C/2)          the kept values, row by row
    X.bitmask     (R, ceil(C/8))    uint8: one bit for each weight, lowest bit first, two of every four set
    X.shape       (2, 1) int64      R and C

Source: 0.10.2, compressors/sparse_compressors/sparse_24_bitmask.py and utils/helpers.py. There fours are counted
through the flattened weight, which is along the rows where 4 divides C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from openwork.files.format import Fetch
from openwork.files.header import Stored
from openwork.files.packing import PACKABLE, integers
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern

_VALUES, _MASK, _SHAPE = ".compressed", ".bitmask", ".shape"


@dataclass(frozen=True)
class Bitmask:
    """How one weight of such a file is to be read. `parts` are the names of its tensors."""

    shape: tuple[int, int]
    dtype: torch.dtype
    parts: tuple[str, ...]
    pattern: ClassVar[Pattern] = Pattern(2, 4)
    axis: ClassVar[Axis] = Axis(flat=True)

    def unpack(self, values: Tensor, mask: Tensor, shape: Tensor) -> Tensor:
        """The dense weight. Raises ValueError where the three tensors do not fit one another."""
        R, C = self.shape
        if tuple(shape.flatten().tolist()) != self.shape:
            raise ValueError(f"its shape says {shape.flatten().tolist()}, its values {[R, C]}: the file is damaged")
        kept_RC = np.unpackbits(mask.numpy(), axis=1, bitorder="little")
        if kept_RC[:, C:].any() or (kept_RC[:, :C].reshape(-1, 4).sum(1) != 2).any():
            raise ValueError("its bitmask does not set two of every four bits: the file is damaged")
        weight = torch.zeros(self.shape, dtype=self.dtype)
        integers(weight).numpy()[kept_RC[:, :C].astype(bool)] = integers(values).numpy().reshape(-1)
        return weight

    def check(self, values: Tensor, mask: Tensor, shape: Tensor) -> None:
        """Raise what `unpack` would."""
        self.unpack(values, mask, shape)

    def fetch_checked(self, fetch: Fetch) -> tuple[Tensor, ...]:
        """The parts. Raises what `unpack` would."""
        parts = tuple(fetch(part, None) for part in self.parts)
        self.unpack(*parts)
        return parts

    def unpacks_in_place(self, weight: Tensor) -> bool:
        """Whether `unpack_into` needs no memory beside the weight."""
        return False

    def unpack_into(self, weight: Tensor, values: Tensor, mask: Tensor, shape: Tensor) -> None:
        """Write what `unpack` gives to a tensor of this shape and dtype."""
        weight.copy_(self.unpack(values, mask, shape))


def bitmasks(stored: Mapping[str, Stored]) -> dict[str, Bitmask]:
    """The compressed weights of a file by dense name, from its header alone; none where it has no bitmasks."""
    weights: dict[str, Bitmask] = {}
    for part in stored:
        base = part.removesuffix(_MASK)
        if base != part:
            name = base if base.rpartition(".")[2] == "weight" else f"{base}.weight".lstrip(".")
            weights[name] = _bitmask(base, stored)
    return weights


def _bitmask(base: str, stored: Mapping[str, Stored]) -> Bitmask:
    if f"{base}.row_offsets" in stored:
        raise ValueError(f"{base!r} is stored as sparse-bitmask, which is not N:M: only sparse-24-bitmask is read here")
    names = tuple(base + end for end in (_VALUES, _MASK, _SHAPE))
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing; load the folder where the model lies in several files")
    values, mask, shape = (stored[name] for name in names)
    R, C = (values.shape[0], 2 * values.shape[1]) if len(values.shape) == 2 else (0, 0)
    if not R * C or R * C % 4 or values.dtype not in PACKABLE:
        raise ValueError(f"{base!r}: {values.dtype} {values.shape} are no values of a 2:4 weight")
    for part, dtype, needed in ((mask, torch.uint8, (R, -(-C // 8))), (shape, torch.int64, (2, 1))):
        if (part.dtype, part.shape) != (dtype, needed):
            raise ValueError(
                f"{base!r}: found a bitmask or shape of {part.dtype} {part.shape}; needed {dtype} {needed}"
            )
    return Bitmask((R, C), values.dtype, names)
