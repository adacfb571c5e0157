"""report.html of a network that was pruned at once: the error of each layer, by solver, and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openwork.pruning.report import PrunedWeight, PruneReport
from openwork.recipes.charts import COLORS, svg
from openwork.recipes.pages import render
from openwork.utils.counted import counted

_LAYERS = ("weight", "pattern", "samples", "error of the mask", "error", "retained", "seconds", "")


def page(
    name: str,
    reports: Mapping[str, PruneReport],
    scores: Mapping[str, Mapping[str, float]],
    arguments: Mapping[str, Any],
) -> str:
    """The document. `reports` by solver, the one whose weights were kept first; `scores` "before" and "after"."""
    solver, kept = next(iter(reports.items()))
    patterns = sorted({str(layer.pattern) for layer in kept.layers})
    lines = [[name, f"{value:.5g}", f"{scores['after'][name]:.5g}"] for name, value in scores["before"].items()]
    return render(
        "prune.html.j2",
        title=f"{name} at {', '.join(patterns)}",
        subtitle=f"{counted(len(kept.layers), 'weight')} pruned by {kept.solver} in {kept.seconds:.0f} s",
        scores=(("score", "dense", "pruned"), lines) if lines else None,
        solvers=(
            ("solver", "mean error of the layers", "seconds"),
            [[each, f"{report.error:.4f}", f"{report.seconds:.0f}"] for each, report in reports.items()],
        ),
        legend_entries=[(each, COLORS[i % len(COLORS)]) for i, each in enumerate(reports)],
        charts=[("Relative error of each layer's outputs", error_chart(reports))],
        shown=solver,
        layers=(_LAYERS, [_line(layer) for layer in kept.layers]),
        dense=(("left dense", "why"), [[*item] for item in kept.skipped.items()]),
        facts=[("arguments", [(key, _text(value)) for key, value in arguments.items()])],
    )


def error_chart(reports: Mapping[str, PruneReport]) -> str:
    """A row of dots a layer, one for each solver, from the first layer at the top to the last."""
    from matplotlib.figure import Figure

    names = [layer.name for layer in next(iter(reports.values())).layers]
    figure = Figure(figsize=(9.4, 0.8 + 0.16 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel="squared error over squared outputs")
    for i, report in enumerate(reports.values()):
        errors = report.errors
        axes.plot(
            [errors[name] for name in names], np.arange(len(names)), "o", color=COLORS[i % len(COLORS)], ms=4, gid="run"
        )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure, "error by layer")


def _line(layer: PrunedWeight) -> list[str]:
    numbers = [f"{layer.masked:.4f}", f"{layer.error:.4f}", f"{layer.retained:.3f}", f"{layer.seconds:.1f}"]
    return [layer.name, str(layer.pattern), f"{layer.samples:,}", *numbers, layer.note]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
