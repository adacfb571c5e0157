"""Charts and pictures for the report: matplotlib's figures as inline SVG, images as data: URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

COLORS = ("#3b6fd4", "#d9730d", "#1f9d6b", "#b5388f", "#8a6d00", "#0e8ca8", "#d13438", "#6e56cf")
MASK_KINDS = {"kept": "#3b6fd4", "pruned": "#d6d9de", "kept in both": "#9fb8e8", "gained": "#1f9d6b", "lost": "#d13438"}
_MAX_SIDE = 320  # pixels of an image in the page


Line = tuple[int, Sequence[tuple[float, float]]]  # of one run: its colour, an index into COLORS, and points (x, y)


def line_chart(title: str, lines: Sequence[Line], *, percent: bool = False, floor: float | None = None) -> str:
    """One line per run over the steps. `floor` fixes the low end of y; `percent` shows shares so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="%" if percent else "")
    for color, points in lines:
        x, y = np.array(points, float).reshape(-1, 2).T
        color_of = COLORS[color % len(COLORS)]
        marker = "o" if len(points) == 1 else None
        axes.plot(x, y * 100 if percent else y, gid="run", color=color_of, lw=1.2, ms=4, marker=marker)
    if not any(points for _, points in lines):
        axes.text(0.5, 0.5, "no records", transform=axes.transAxes, ha="center")
    axes.set_ylim(bottom=floor)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure, title)


def mask_picture(title: str, kinds_OK: np.ndarray, group: int) -> str:
    """Squares (outputs, weights) by index into `MASK_KINDS`, with a gap between groups of `group` weights."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows, columns = kinds_OK.shape
    figure = Figure(figsize=(columns / 16, rows / 16))
    axes = figure.add_axes((0, 0, 1, 1))
    colours = ListedColormap(list(MASK_KINDS.values()))
    axes.imshow(kinds_OK, colours, vmin=0, vmax=len(MASK_KINDS) - 1, interpolation="none", aspect="auto")
    axes.vlines(np.arange(group, columns, group) - 0.5, -0.5, rows - 0.5, color="white", lw=0.8)
    axes.set_axis_off()
    return svg(figure, title)


def svg(figure: Any, title: str) -> str:
    """The same text for the same figure. Names are taken out but for those that are referred to, which are its own."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = file.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r' id="(\w+_\d+|matplotlib\.axis_\d+)"', "", text)
    return text.replace('<g id="run">', '<g class="run">')


def image_uri(image_HW3: np.ndarray) -> str:
    """A JPEG of at most 320 pixels a side, as a data: URI."""
    from PIL import Image

    image, file = Image.fromarray(image_HW3), io.BytesIO()
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
