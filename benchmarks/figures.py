"""Figures of the documentation: one SVG each, light or dark as its reader is.

python benchmarks/figures.py docs/FIGURE.svg ...    # of figures that were drawn without: adds the dark colours
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

# What matplotlib draws in light -> in dark: paper, ink, the box of a legend, grid lines, and its ten colours.
_PAPER, _TEXT = "#1e2129", "#e2e4e9"
_IN_DARK = {
    "#ffffff": _PAPER,
    "#000000": _TEXT,
    "#cccccc": "#5b606b",
    "#b0b0b0": "#6d727d",
    "#1f77b4": "#6cb2eb",
    "#ff7f0e": "#ffa04d",
    "#2ca02c": "#5fc95f",
    "#d62728": "#f47174",
    "#9467bd": "#bb9be8",
    "#8c564b": "#c49087",
    "#e377c2": "#f0a3dc",
    "#7f7f7f": "#a6abb5",
    "#bcbd22": "#d3d450",
    "#17becf": "#4fd8e6",
}


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as an SVG with text as text, the same bytes in every run, in two colour schemes."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "openwork"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    path.write_text(with_dark(file.getvalue()), encoding="utf-8")


def with_dark(svg: str) -> str:
    """The SVG of a figure with a second set of colours, for pages whose `color-scheme` is dark."""
    if "prefers-color-scheme" in svg:
        return svg
    rules = [f"text {{fill: {_TEXT}}}"]
    for light, dark in _IN_DARK.items():
        rules += [f'[style*="{what}: {light}"] {{{what}: {dark} !important}}' for what in ("fill", "stroke")]
    dark = "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"
    return svg.replace("</style>", f"\n{dark}\n</style>", 1)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(with_dark(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
