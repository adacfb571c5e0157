"""The figure of a task in docs/results.md: how dense training converges, and every sparse run beside dense.

Left: the score of dense networks that were trained for half of the steps, all of them, and twice as many (one seed).
Right: the score of each run of the comparison, a dot a seed, and their mean. For benchmarks/results_page.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from openwork.recipes.task import Metric


def plot(same: Sequence[dict[str, Any]], longer: Sequence[dict[str, Any]], path: Path) -> None:
    """The stored comparisons of one task: those of equal length, and the dense run of twice that."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    metric = Metric(**same[0]["metrics"][0])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "openwork"}):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 2))
        _convergence(left, [same[0], *longer], metric)
        _methods(right, same, metric)
        left.set_ylabel(metric.heading)
        figure.savefig(path, metadata={"Date": None})


def _convergence(ax: Any, documents: Sequence[dict[str, Any]], metric: Metric) -> None:
    """Dense scores against their steps."""
    points: dict[int, list[float]] = {}
    for document in documents:
        dense = next((row for row in document["rows"] if row["method"] == "dense"), None)
        if dense is None:
            continue
        runs = [run[metric.key] for run in document["runs"] if run["method"] == "dense"]
        points.setdefault(dense["steps"], []).extend(metric.scale * score for score in runs if score is not None)
        for score in document.get("half", []):
            points.setdefault(dense["steps"] // 2, []).append(metric.scale * score)
    steps = sorted(points)
    ax.plot(steps, [fmean(points[each]) for each in steps], color="C0")
    for each in steps:
        ax.scatter([each] * len(points[each]), points[each], s=14, color="C0")
    ax.set(title="dense, by length", xlabel="steps", xlim=(0, None))
    ax.grid(alpha=0.3)


def _methods(ax: Any, documents: Sequence[dict[str, Any]], metric: Metric) -> None:
    """Scores by method and pattern, of the seeds that dense has."""
    groups: dict[str, dict[int, float]] = {}
    for document in documents:
        for run in document["runs"]:
            name = "dense" if run["method"] == "dense" else f"{run['method']}\n{run['pattern']}"
            if run[metric.key] is not None:
                groups.setdefault(name, {})[run["seed"]] = metric.scale * run[metric.key]
    for place, (name, scores) in enumerate(groups.items()):
        colour = "C0" if name == "dense" else "C1"
        ax.scatter([place] * len(scores), scores.values(), s=14, color=colour)
        mean = fmean(scores.values())
        ax.plot([place - 0.3, place + 0.3], [mean, mean], color=colour)
        if name == "dense":
            ax.axhline(mean, color=colour, linewidth=0.8, alpha=0.4)
    crowded = len(groups) > 6
    ax.set_xticks(range(len(groups)), groups, rotation=90 if crowded else 0, fontsize=7 if crowded else 8)
    ax.set(title="each run, and the mean")
    ax.grid(alpha=0.3, axis="y")
