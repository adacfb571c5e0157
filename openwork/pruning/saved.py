"""Weights that are pruned already, kept in a folder, so that a run that was stopped loses one layer at most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openwork.nm.pattern import Pattern
from openwork.pruning.report import PrunedWeight
from openwork.pruning.solver import Solver
from openwork.training.select import Candidate
from openwork.utils.atomic import atomic_file, write_text
from openwork.utils.checksum import as_text, crc32
from openwork.utils.example import tensors_of
from openwork.utils.torch_private import is_traceable_wrapper_subclass

_RESULT, _CHECKSUM = "openwork.pruned", "openwork.checksum"


class Saved:
    """The folder of one run: `run.json` says which, and each pruned weight is a safetensors file.

    Raises ValueError where the folder is that of another run: another solver, other weights, patterns or batches; and
    where a file in it is damaged."""

    def __init__(
        self,
        folder: Path,
        solver: Solver,
        model: nn.Module,
        candidates: Mapping[str, Candidate],
        batches: Sequence[Any],
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        patterns = {
            name: [str(each.pattern), repr(each.axis), repr(each.output_axis)] for name, each in candidates.items()
        }
        every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = {name: _described(tensor) for name, tensor in every.items()}
        mine = {
            "solver": repr(solver),
            "batches": [[_described(tensor) for tensor in tensors_of(batch)] for batch in batches],
            "weights": [patterns, weights],
        }
        run = folder / "run.json"
        if not run.exists():
            write_text(run, json.dumps(mine, indent=1))
        try:
            theirs = dict(json.loads(run.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{run} is damaged ({error}): delete {folder} to start again") from None
        if changed := [key for key in mine if mine[key] != theirs.get(key)]:
            raise ValueError(
                f"{folder} holds a run with other {' and '.join(changed)}; choose another folder, or start from the "
                "same dense network, batches and arguments"
            )

    def load(self, candidate: Candidate) -> tuple[Tensor, PrunedWeight] | None:
        """A weight that was pruned before, and what was found then; None where it was not."""
        file = self._file(candidate)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata, weight = opened.metadata(), opened.get_tensor("weight")
            if metadata[_CHECKSUM] != checksum(weight) or weight.shape != candidate.weight.shape:
                raise ValueError("its numbers are not those that were written")
            values = json.loads(metadata[_RESULT])
            return weight, PrunedWeight(**{**values, "pattern": Pattern.parse(values["pattern"])})
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and its weight is pruned again") from None

    def save(self, candidate: Candidate, result: PrunedWeight) -> None:
        values = json.dumps({**asdict(result), "pattern": str(result.pattern)})
        weight = candidate.weight.detach().contiguous()
        with atomic_file(self._file(candidate)) as part:
            save_file({"weight": weight}, part, {_RESULT: values, _CHECKSUM: checksum(weight)})

    def _file(self, candidate: Candidate) -> Path:
        return self.folder / f"{quote(candidate.name, safe='')}.safetensors"


def _described(tensor: Tensor) -> str:
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not is_traceable_wrapper_subclass(tensor)
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {checksum(tensor) if plain else ''}"


def checksum(tensor: Tensor) -> str:
    """Of a tensor's numbers."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return as_text(crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b""))
