"""Inline SVG: line charts and mask pictures. Colours come from the page's style sheet, so both themes are readable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_W, _H = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 12, 12, 34
_LABEL = 8  # characters of a number that fit beside the axis


@dataclass(frozen=True)
class Line:
    """Points (x, y) of one run; `color` is an index into the page's palette."""

    label: str
    color: int
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`.

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / wanted or 1.0
    base = 10.0 ** math.floor(math.log10(raw))
    step = min((base * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Maps values to the drawing area."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (_W - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _H - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_H - _TOP - _BOTTOM)


def _frame(lines: Sequence[Line], floor: float | None) -> _Frame:
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    low, high = (min(ys) if floor is None else floor), max(ys)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return _Frame(0, max(xs), low - margin if floor is None else floor, high + margin)


def line_chart(title: str, lines: Sequence[Line], *, percent: bool = False, floor: float | None = None) -> str:
    """A figure over steps with one polyline per run. `floor` fixes the low end of y; `percent` prints shares so."""
    drawn = [line for line in lines if line.points]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not drawn:
        return f"<figure>{caption}<p>no records</p></figure>"
    frame = _frame(drawn, floor)
    parts = [_grid_y(t, frame.y(t), percent) for t in ticks(frame.y0, frame.y1)]
    parts += [_tick_x(t, frame.x(t)) for t in ticks(frame.x0, frame.x1)]
    parts += [f'<text class="axis" x="{(_LEFT + _W - _RIGHT) / 2}" y="{_H - 4}" text-anchor="middle">step</text>']
    parts += [_polyline(line, frame) for line in drawn]
    svg = f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)} by step">{"".join(parts)}</svg>'
    return f"<figure>{caption}{svg}</figure>"


def _polyline(line: Line, frame: _Frame) -> str:
    style, title = f'class="line c{line.color}"', f"<title>{escape(line.label)}</title>"
    if len(line.points) == 1:
        ((x, y),) = line.points
        return f'<circle {style} cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5">{title}</circle>'
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    return f'<polyline {style} points="{path}">{title}</polyline>'


def _grid_y(value: float, y: float, percent: bool) -> str:
    shown = 100 * value if percent else value
    text = f"{shown:g}" if len(f"{shown:g}") <= _LABEL else f"{shown:.2e}"
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}{" %" if percent else ""}</text>'
    )


def _tick_x(value: float, x: float) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{_H - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>'


KINDS = "kpsgl"


def mask_picture(title: str, rows: Sequence[Sequence[str]], group: int) -> str:
    """Squares by class name, one row per output; a gap every `group` squares.

    "k" kept, "p" pruned; where two masks are compared "s" kept in both, "p" in none, "g" gained, "l" lost.
    """
    size, gap = 4, 1
    width = max((len(row) for row in rows), default=0)
    parts = [
        f'<path class="{kind}" d="{_squares(rows, kind, size, gap, group)}"/>'
        for kind in KINDS
        if any(kind in row for row in rows)
    ]
    w = width * size + (width // group) * gap
    box = f'viewBox="0 0 {w} {len(rows) * size}" style="max-width:{2 * w}px"'
    svg = f'<svg class="mask" {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _squares(rows: Sequence[Sequence[str]], kind: str, size: int, gap: int, group: int) -> str:
    side = size - 0.5
    return "".join(
        f"M{c * size + c // group * gap} {r * size}h{side}v{side}h-{side}z"
        for r, row in enumerate(rows)
        for c, cell in enumerate(row)
        if cell == kind
    )
