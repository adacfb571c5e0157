"""What `prune` did, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from openwork.nm.pattern import Pattern
from openwork.training.report import Report
from openwork.utils.counted import counted
from openwork.utils.table import aligned


@dataclass(frozen=True)
class PrunedWeight:
    """One weight. `samples`: rows of input that its matrix saw, the least of them where it is several (experts).

    Errors are of its outputs on the calibration batches: the sum of squared differences over the sum of squares.
    `masked` is that of the solver's mask on the weights as they were, `error` that of what the solver left; NaN where
    no input was seen. `retained`: the mask's share of the sum of squared weights. `seconds` of the solver alone.
    """

    name: str
    pattern: Pattern
    samples: int
    masked: float
    error: float
    retained: float
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did. `str()` is a table of the weights, `report` the one that `sparsify` gives as well: what is
    sparse, what is not and why.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))
    >>> report = ow.prune(model, "2:4", [torch.randn(64, 16)], exclude=["1"])
    >>> list(report.errors), report.skipped
    (['0.weight'], {'1.weight': "excluded by '1'"})
    """

    layers: tuple[PrunedWeight, ...]
    report: Report
    solver: str
    seconds: float

    @property
    def errors(self) -> Mapping[str, float]:
        """The relative output error of each weight that was pruned."""
        return {layer.name: layer.error for layer in self.layers}

    @property
    def error(self) -> float:
        """The mean of the errors that are known."""
        known = [layer.error for layer in self.layers if not math.isnan(layer.error)]
        return sum(known) / len(known) if known else math.nan

    @property
    def skipped(self) -> Mapping[str, str]:
        """Weights left alone and the reasons."""
        return self.report.skipped

    def __str__(self) -> str:
        header = ["weight", "pattern", "samples", "masked", "error", "retained", "seconds", "note"]
        lines = [
            [
                layer.name,
                str(layer.pattern),
                str(layer.samples),
                f"{layer.masked:.4f}",
                f"{layer.error:.4f}",
                f"{layer.retained:.3f}",
                f"{layer.seconds:.2f}",
                layer.note,
            ]
            for layer in self.layers
        ]
        dense = [f"  dense: {name} ({reason})" for name, reason in self.skipped.items()]
        pruned = counted(sum(not layer.pattern.is_dense for layer in self.layers), "weight")
        end = f"{pruned} pruned by {self.solver} in {self.seconds:.0f} s; mean error {self.error:.4f}"
        return "\n".join([*aligned(header, lines), end, *dense, *self.report.notes])
