"""Weights that are pruned already, kept in a folder, so that a run that was stopped loses one layer at most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from openwork.nm.pattern import Pattern
from openwork.pruning.report import PrunedWeight
from openwork.pruning.solver import Solver
from openwork.training.select import Candidate
from openwork.utils.atomic import atomic_file, write_text
from openwork.utils.checksum import as_text, crc32
from openwork.utils.example import tensors_of

_RESULT = "openwork.pruned"


class Saved:
    """The folder of one run: `run.json` says which, and each pruned weight is a safetensors file.

    Raises ValueError where the folder is that of another run: another solver, other weights, patterns or batches."""

    def __init__(self, folder: Path, solver: Solver, candidates: Mapping[str, Candidate], batches: Sequence[Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: [str(each.pattern), list(each.weight.shape), checksum(each.weight)]
            for name, each in candidates.items()
        }
        tensors = [tensor for batch in batches for tensor in tensors_of(batch)]
        mine = {"solver": repr(solver), "batches": [checksum(tensor) for tensor in tensors], "weights": weights}
        run = folder / "run.json"
        if not run.exists():
            write_text(run, json.dumps(mine, indent=1))
        theirs = json.loads(run.read_text(encoding="utf-8"))
        if changed := [key for key in mine if mine[key] != theirs.get(key)]:
            raise ValueError(
                f"{folder} holds a run with other {' and '.join(changed)}; choose another folder, or start from the "
                "same dense network, batches and arguments"
            )

    def load(self, candidate: Candidate) -> PrunedWeight | None:
        """Fill in a weight that was pruned before, and say what was found then; None where it was not."""
        file = self._file(candidate)
        if not file.exists():
            return None
        with safe_open(file, framework="pt") as opened:
            values = json.loads(opened.metadata()[_RESULT])
            candidate.weight.detach().copy_(opened.get_tensor("weight"))
        return PrunedWeight(**{**values, "pattern": Pattern.parse(values["pattern"])})

    def save(self, candidate: Candidate, result: PrunedWeight) -> None:
        values = json.dumps({**asdict(result), "pattern": str(result.pattern)})
        with atomic_file(self._file(candidate)) as part:
            save_file({"weight": candidate.weight.detach().contiguous()}, part, {_RESULT: values})

    def has(self, candidates: Sequence[Candidate]) -> bool:
        """Whether all of these were pruned before."""
        return all(self._file(each).exists() for each in candidates)

    def _file(self, candidate: Candidate) -> Path:
        return self.folder / f"{quote(candidate.name, safe='')}.safetensors"


def checksum(tensor: Tensor) -> str:
    """Of a tensor's numbers."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return as_text(crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b""))
