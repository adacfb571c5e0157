"""The figure of a task in docs/results.md, for benchmarks/results_page.py.

Above: dense scores by length (half of the steps, all, twice as many), and SR-STE's score by its decay, on the samples
that it was chosen by. Below: SAD over the training of the first seed, and every run beside dense, a dot a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import save

from openwork.recipes.task import Metric

Document = dict[str, Any]


def plot(same: Sequence[Document], longer: Sequence[Document], choosing: Sequence[Document], path: Path) -> None:
    """The stored comparisons of one task: of equal length, of twice that, and those that chose SR-STE's decay."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    metric = Metric(**same[0]["metrics"][0])
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 5.6), layout="constrained")
        (length, decay), (movement, runs) = figure.subplots(2, 2, width_ratios=(2, 3))
        _by_length(length, [same[0], *longer], metric)
        _by_decay(decay, choosing, metric)
        _movement(movement, same[0])
        _runs(runs, same, metric)
        for ax in (length, decay, runs):
            ax.set_ylabel(metric.heading)
        save(figure, path)


def _by_length(ax: Any, documents: Sequence[Document], metric: Metric) -> None:
    points: dict[int, list[float]] = {}
    for document in documents:
        steps = next(row["steps"] for row in document["rows"] if row["method"] == "dense")
        scores = [run[metric.key] for run in document["runs"] if run["method"] == "dense"]
        for length, found in ((steps, scores), (steps // 2, document.get("half", []))):
            points.setdefault(length, []).extend(metric.scale * score for score in found if score is not None)
    lengths = sorted(length for length in points if points[length])
    ax.plot(lengths, [fmean(points[length]) for length in lengths], color="C0")
    for length in lengths:
        ax.scatter([length] * len(points[length]), points[length], s=12, color="C0")
    ax.set(title="dense, by length", xlabel="steps", xlim=(0, None))
    ax.grid(alpha=0.3)


def _by_decay(ax: Any, documents: Sequence[Document], metric: Metric) -> None:
    """A line for each pattern; negative decays have a part of the axis of their own."""
    rows = [row for document in documents for row in document["rows"] if row["method"] == "sr-ste"]
    decays = sorted({row["options"]["decay"] for row in rows})
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        here = {row["options"]["decay"]: row["scores"][metric.key] for row in rows if row["pattern"] == pattern}
        told = [
            (decays.index(decay), metric.scale * score) for decay, score in sorted(here.items()) if score is not None
        ]
        ax.plot(*zip(*told, strict=True), marker="o", markersize=3, label=pattern)
    ax.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    ax.set(title="SR-STE, by decay (held-out samples, one seed)", xlabel="decay")
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)


def _movement(ax: Any, document: Document) -> None:
    """How many weights changed sides since the start, over the training."""
    for name, curve in document["sad"].items():
        if any(share for _, share in curve):
            ax.plot([step for step, _ in curve], [100 * share for _, share in curve], label=name)
    ax.set(title="SAD since the start", xlabel="steps", ylabel="% of the weights", xlim=(0, None), ylim=(0, None))
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)


def _runs(ax: Any, documents: Sequence[Document], metric: Metric) -> None:
    groups: dict[str, dict[int, float]] = {}
    for run in (run for document in documents for run in document["runs"]):
        name = "dense" if run["method"] == "dense" else f"{run['method']}\n{run['pattern']}"
        if run[metric.key] is not None:
            groups.setdefault(name, {})[run["seed"]] = metric.scale * run[metric.key]
    for place, (name, scores) in enumerate(groups.items()):
        colour, mean = "C0" if name == "dense" else "C1", fmean(scores.values())
        ax.scatter([place] * len(scores), scores.values(), s=12, color=colour)
        ax.plot([place - 0.3, place + 0.3], [mean, mean], color=colour)
        if name == "dense":
            ax.axhline(mean, color=colour, linewidth=0.8, alpha=0.4)
    crowded = len(groups) > 6
    ax.set_xticks(range(len(groups)), groups, rotation=90 if crowded else 0, fontsize=7 if crowded else 9)
    ax.set(title="each run, and the mean")
    ax.grid(alpha=0.3, axis="y")
