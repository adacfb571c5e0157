"""What the trainers' objects share: the compressed file in a checkpoint's folder, the scalars of a new record."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import openwork as ow
from openwork.files.reader import FILE as FILE
from openwork.training.record import sparsity_records, unfinished_weights
from openwork.utils.caller import outside


def save_compressed(model: nn.Module, folder: str | Path, file: str = FILE) -> None:
    """Write the weights that the forward pass uses, compressed, as `folder`/model.openwork.safetensors; `ow.load`
    reads it. Nothing is written where a method keeps every weight in the end."""
    if is_sparsified(model):
        Path(folder).mkdir(parents=True, exist_ok=True)
        ow.save(model, Path(folder) / file)


def save_beside_checkpoint(model: nn.Module, folder: str | Path, file: str = FILE) -> None:
    """The same for a training that goes on. While the method's schedule runs, no weights are N:M yet: then nothing is
    written, with a warning."""
    if running := unfinished_weights(model):
        state = next(iter(running.values()))
        warnings.warn(
            f"no {file} beside the checkpoint in {folder}, which is for resuming: {state}", stacklevel=outside()
        )
    else:
        save_compressed(model, folder, file)


def verify_recorded(model: nn.Module) -> None:
    """`ow.verify`, where something was recorded: `ow.Dense` only watches."""
    if is_sparsified(model):
        ow.verify(model)


def is_sparsified(model: nn.Module) -> bool:
    return any(record.method.ends_sparse for _, _, record in sparsity_records(model))


class Scalars:
    """Hands out the scalars of each topology record once."""

    def __init__(self, topology: ow.Topology):
        self.topology, self._seen = topology, len(topology.records)

    def new(self) -> dict[str, float]:
        """Those of the last record if it is new, else nothing."""
        seen, self._seen = self._seen, len(self.topology.records)
        return self.topology.scalars() if self._seen > seen else {}


def to_text(state: dict[str, Any]) -> str:
    """A state dict for a JSON file, exactly.

    >>> from_text(to_text({"mask": torch.tensor([True])}))
    {'mask': tensor([True])}
    """
    torch.save(state, buffer := io.BytesIO())
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
