"""From the results of runs to the rows of one table: means, spreads, differences to dense."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One method at one pattern and decay, over its seeds. Accuracies and shares in [0, 1], times in seconds.

    `std` is the sample standard deviation; None with one seed. `delta` is the mean difference to the dense runs of
    the same seeds, `p` the p-value of its paired t-test (three seeds or more). `budget` counts trainings.
    """

    method: str
    pattern: str
    decay: float | None
    seeds: list[int]
    accuracy: float
    std: float | None
    delta: float | None
    p: float | None
    sad_start: float | None
    churn: float | None
    density: float
    macs: int | None
    seconds_per_step: float | None
    epochs: int
    budget: int


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Groups results by method, pattern and decay; order as given, dense first."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for result in results:
        c = result["config"]
        groups.setdefault((c["method"], c["pattern"], c["decay"] if c["method"] == "sr-ste" else 0.0), []).append(
            result
        )
    dense = {r["config"]["seed"]: r["val_accuracy"] for r in results if r["config"]["method"] == "dense"}
    return [_row(group, dense) for group in groups.values()]


def _row(group: Sequence[dict[str, Any]], dense: dict[int, float]) -> Row:
    c = group[0]["config"]
    accuracies = [r["val_accuracy"] for r in group]
    seeds = [r["config"]["seed"] for r in group]
    paired = c["method"] != "dense" and all(seed in dense for seed in seeds)
    deltas = [a - dense[seed] for a, seed in zip(accuracies, seeds, strict=True)] if paired else []
    return Row(
        method=c["method"],
        pattern="-" if c["method"] == "dense" else c["pattern"],
        decay=c["decay"] if c["method"] == "sr-ste" else None,
        seeds=seeds,
        accuracy=statistics.fmean(accuracies),
        std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        delta=statistics.fmean(deltas) if deltas else None,
        p=paired_p(deltas),
        sad_start=_mean(group, "sad_start"),
        churn=_mean(group, "churn"),
        density=statistics.fmean(r["density"] for r in group),
        macs=group[0]["macs"],
        seconds_per_step=_median(group, "seconds_per_step"),
        epochs=c["epochs"],
        budget=2 if c["method"] == "asp" else 1,
    )


def _mean(group: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in group if r[key] is not None]
    return statistics.fmean(values) if values else None


def _median(group: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in group if r[key] is not None]
    return statistics.median(values) if values else None


def paired_p(deltas: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test that the mean difference is zero; None for fewer than three pairs."""
    if len(deltas) < 3 or len(set(deltas)) == 1:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(deltas, 0.0).pvalue)


def label_of(config: dict[str, Any]) -> str:
    """What tells a run's method apart: "dense", "ste 2:4", "sr-ste 2:4 0.0002"."""
    parts = [config["method"]] if config["method"] == "dense" else [config["method"], config["pattern"]]
    return " ".join([*parts, f"{config['decay']:g}"] if config["method"] == "sr-ste" else parts)


HEADER = (
    "method",
    "pattern",
    "decay",
    "accuracy %",
    "to dense",
    "p",
    "SAD %",
    "churn %/step",
    "density",
    "MACs",
    "ms/step",
    "epochs",
)


def cells(row: Row) -> list[str]:
    """A row as text, for the terminal and the page."""
    spread = f"± {100 * row.std:.2f} ({len(row.seeds)} seeds)" if row.std is not None else "(1 seed)"
    return [
        row.method,
        row.pattern,
        _text(row.decay, "g"),
        f"{100 * row.accuracy:.2f} {spread}",
        _text(row.delta, "+.2f", 100),
        _text(row.p, ".3f"),
        _text(row.sad_start, ".1f", 100),
        _text(row.churn, ".3f", 100),
        f"{row.density:.3f}",
        _millions(row.macs),
        _text(row.seconds_per_step, ".1f", 1000),
        f"{row.epochs}" if row.budget == 1 else f"{row.budget} x {row.epochs}",
    ]


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)


def _millions(macs: int | None) -> str:
    return "-" if macs is None else f"{macs / 1e6:.3g} M"


NOTES = (
    "accuracy: of the finalized network on the validation images, mean ± sample standard deviation over the seeds;",
    "to dense: mean difference in points to the dense runs of the same seeds; p: paired t-test, with 3 seeds or more;",
    "SAD: share of the sparse layers' weights whose membership at the end differs from the start;",
    "churn: the share that changes in one step, mean over the recorded steps; dense: of the mask it would have;",
    "ASP starts from the dense run of its seed, so its budget is two trainings.",
)


def plain_table(rows: Sequence[Row]) -> str:
    """The table as aligned text."""
    lines = [list(HEADER), *[cells(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
