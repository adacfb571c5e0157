"""The folder of a run that may be stopped: what it takes for its own, and what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.pruning.report import PruneReport

SOLVER = ow.SparseGPT()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def run(folder: Path, model: nn.Module | None = None, pattern: Any = "2:4", shape: Any = (60, 16)) -> PruneReport:
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).view(shape)
    return ow.prune(net() if model is None else model, pattern, [x], solver=SOLVER, resume=folder)


def test_what_is_not_pruned_belongs_to_the_run_too(tmp_path: Path) -> None:
    run(tmp_path)
    other = net()
    with torch.no_grad():
        other[0].bias += 1
    with pytest.raises(ValueError, match="holds a run with other weights"):
        run(tmp_path, other)
    with pytest.raises(ValueError, match="holds a run with other weights"):
        run(tmp_path, pattern=ow.Selection("2:4", transposable=True))
    with pytest.raises(ValueError, match="holds a run with other batches"):
        run(tmp_path, shape=(4, 15, 16))


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:100], lambda data: data[:-8] + b"\x00\x00\xc8\x42" * 2]
)
def test_a_damaged_file_is_told(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = run(tmp_path)
    file = tmp_path / "2.weight.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"2\.weight\.safetensors is damaged .* delete it"):
        run(tmp_path)
    file.unlink()
    assert run(tmp_path).errors == expected.errors
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged .* delete"):
        run(tmp_path)
