"""Do the changes of the mask tell how good the network will be? Accuracy against SAD and flip rate, over many runs.

    python benchmarks/mask_changes.py classification-methods.json language-methods.json

The files are results of `openwork compare`, in benchmarks/results. Each point is one sparse run: its score less that
of the dense run of its seed (positive: better), beside the SAD since the start and the mean flip rate a step. Runs
whose mask cannot move (ASP) are left out. For each pattern Spearman's rank correlation over the runs, with a 95 %
interval from a bootstrap over the *choices* (a method and its options): the seeds of one choice are no independent
evidence. Written to docs/mask-changes.svg, and as a table between the lines `<!-- mask changes -->` and
`<!-- end mask changes -->` of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import save
from gpu_tables import between
from results_page import PAGE, RESULTS, markdown
from scipy.stats import rankdata

FIGURE = PAGE.with_name("mask-changes.svg")
MEASURES = {"sad_start": "SAD since the start, %", "flip_rate": "flip rate, % a step"}
_DRAWS = 2000
_NO_OPTIONS = ("method", "pattern", "seed", "density", "seconds")


@dataclass(frozen=True)
class Run:
    """One sparse run: what `change` of the mask it had by measure, and its score less the dense run's."""

    panel: str
    choice: str
    change: dict[str, float]
    gain: float


def runs_of(document: dict[str, Any]) -> list[Run]:
    """The sparse runs of one comparison whose mask moved. Runs that diverged have no score and are left out."""
    metric, task = document["metrics"][0], document["config"]["task"]
    sign = (1 if metric["higher_is_better"] else -1) * metric["scale"]
    dense = {run["seed"]: run[metric["key"]] for run in document["runs"] if run["method"] == "dense"}
    measured = {*(each["key"] for each in document["metrics"]), *MEASURES, *_NO_OPTIONS}
    found = []
    for run in document["runs"]:
        told = [run.get(key) for key in (metric["key"], *MEASURES)]
        if run["method"] == "dense" or None in told or dense.get(run["seed"]) is None or not run["flip_rate"]:
            continue
        options = [f"{key}={value}" for key, value in run.items() if key not in measured]
        choice = " ".join([run["method"], *options])
        change = {key: 100 * run[key] for key in MEASURES}
        panel = f"{task}, {run['pattern']}"
        found.append(Run(panel, choice, change, sign * (run[metric["key"]] - dense[run["seed"]])))
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; NaN where all of one side are equal."""
    a, b = rankdata(x), rankdata(y)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def interval(runs: Sequence[Run], measure: str, draws: int = _DRAWS) -> tuple[float, float, float]:
    """The rank correlation of gain and change over the runs, and its 95 % interval by a bootstrap over choices."""
    choices: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        choices.setdefault(run.choice, []).append((run.change[measure], run.gain))
    groups = [np.array(points) for points in choices.values()]
    whole = spearman(*np.concatenate(groups).T)
    draw = np.random.default_rng(0).integers(len(groups), size=(draws, len(groups)))
    values = [spearman(*np.concatenate([groups[i] for i in row]).T) for row in draw]
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return whole, float(low), float(high)


def by_panel(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.panel, []).append(run)
    return found


def table(panels: dict[str, list[Run]]) -> list[str]:
    rows = []
    for panel, runs in panels.items():
        cells = [panel, str(len(runs)), str(len({run.choice for run in runs}))]
        for measure in MEASURES:
            rho, low, high = interval(runs, measure)
            cells.append(f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append(cells)
    return markdown(["task, pattern", "runs", "choices", "with SAD", "with flip rate"], rows)


def plot(panels: dict[str, list[Run]], path: Path) -> None:
    from matplotlib.figure import Figure

    methods = sorted({run.choice.split()[0] for runs in panels.values() for run in runs})
    colour = {method: f"C{i}" for i, method in enumerate(methods)}
    figure = Figure(figsize=(7.6, 2.6 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), len(MEASURES), squeeze=False)
    for row, (panel, runs) in zip(axes, panels.items(), strict=True):
        for ax, (measure, label) in zip(row, MEASURES.items(), strict=True):
            for method in methods:
                points = [(run.change[measure], run.gain) for run in runs if run.choice.split()[0] == method]
                if points:
                    ax.scatter(*zip(*points, strict=True), s=14, color=colour[method], label=method)
            ax.set(title=panel, xlabel=label, ylabel="score less dense", xscale="log")
            ax.grid(alpha=0.3)
    handles = {h: label for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    once = {label: handle for handle, label in handles.items()}
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="files in benchmarks/results")
    asked = parser.parse_args(words)
    documents = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in asked.names]
    panels = by_panel([run for document in documents for run in runs_of(document)])
    plot(panels, FIGURE)
    page = PAGE.read_text(encoding="utf-8")
    text = "\n".join(["", *table(panels), "", f"![Score against changes of the mask]({FIGURE.name})", "", ""])
    page = between(page, "<!-- mask changes -->\n", text, PAGE, "<!-- end mask changes -->")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
