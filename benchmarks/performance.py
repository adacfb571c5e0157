"""Write the tables and plots of docs/performance.md from the CSV files of `openwork bench`.

    openwork bench masks linear threads --threads 1 2 --out build/operators.csv
    openwork bench resnet50 encoder --patterns 2:4 1:4 --threads 1 2 --out build/models.csv
    python benchmarks/performance.py build/operators.csv build/models.csv

Tables are printed between the lines `<!-- NAME -->` of the page; plots go to docs/performance-*.svg.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
Row = dict[str, str]


def read(files: Iterable[str]) -> list[Row]:
    return [row for file in files for row in csv.DictReader(Path(file).open(newline=""))]


def ratio(row: Row) -> str:
    return f"{float(row['ratio']):.2f}"


def masks(rows: list[Row]) -> list[str]:
    """Times over that of a copy, and under that of the argsort form."""
    lines = [
        "| pattern | threads | prune over memcpy | of bound | SR-STE term over memcpy | argsort form over prune |",
        "|---|---|---|---|---|---|",
    ]
    for pattern, threads in dict.fromkeys((row["pattern"], row["threads"]) for row in rows if row["op"] == "mask"):
        at = {
            row["impl"]: row
            for row in rows
            if (row["op"], row["pattern"], row["threads"]) == ("mask", pattern, threads)
        }
        prune, term = float(at["prune"]["ratio"]), float(at["SR-STE term"]["ratio"])
        argsort = float(at["argsort"]["p50_us"]) / float(at["prune"]["p50_us"])
        share = float(at["prune"]["roofline"])
        lines.append(f"| {pattern} | {threads} | {1 / prune:.2f} | {share:.0%} | {1 / term:.2f} | {argsort:.0f} |")
    return lines


def linear(rows: list[Row]) -> list[str]:
    """Ratios to the fastest dense product, the faster layout of each."""
    found = [row for row in rows if row["op"] == "linear"]
    patterns = [p for p in dict.fromkeys(row["pattern"] for row in found) if p != "dense"]
    lines = [
        f"| B, K, O | threads | dtype | dense us, by | {' | '.join(patterns)} |",
        "|---" * (4 + len(patterns)) + "|",
    ]
    for shape, threads in dict.fromkeys((row["shape"], row["threads"]) for row in found):
        here = [row for row in found if (row["shape"], row["threads"]) == (shape, threads)]
        for dtype in ("float32", "bfloat16", "int8"):
            cells = []
            for pattern in patterns:
                of = [row for row in here if row["pattern"] == pattern and row["dtype"] == dtype]
                best = max(of, key=lambda row: float(row["ratio"]))
                cells.append(f"{ratio(best)} ({float(best['roofline']):.0%})")
            dense = f"{float(here[0]['baseline_p50_us']):.0f}, {here[0]['baseline']}"
            lines.append(
                f"| {', '.join(re.findall('[0-9]+', shape))} | {threads} | {dtype} | {dense} | {' | '.join(cells)} |"
            )
    return lines


def models(rows: list[Row]) -> list[str]:
    lines = ["| model | threads | variant | ms, p50 [p20, p80] | faster than the best dense |", "|---|---|---|---|---|"]
    for row in rows:
        if row["op"] in ("mask", "linear"):
            continue
        p20, p50, p80 = (float(row[name]) / 1e3 for name in ("p20_us", "p50_us", "p80_us"))
        lines.append(
            f"| {row['op']}, {row['shape']} | {row['threads']} | {row['impl']} "
            f"| {p50:.1f} [{p20:.1f}, {p80:.1f}] | {ratio(row)} |"
        )
    return lines


def plot(rows: list[Row], threads: str) -> str:
    """Bars of the float32 ratios by shape, as SVG: one colour a pattern, a line where dense is."""
    found = [row for row in rows if row["op"] == "linear" and row["dtype"] == "float32" and row["threads"] == threads]
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    patterns = [p for p in dict.fromkeys(row["pattern"] for row in found) if p != "dense"]
    colours, width, height = ("#4477aa", "#66ccee", "#228833", "#ccbb44"), 110 * len(shapes) + 60, 300
    top = max(float(row["ratio"]) for row in found)
    size = f'viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">']
    for tick in range(0, int(top) + 2, 2):
        y = 250 - 220 * tick / (top + 1)
        parts.append(
            f'<line x1="40" x2="{width}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>'
            f'<text x="8" y="{y + 4:.0f}">{tick} x</text>'
        )
    for i, shape in enumerate(shapes):
        for j, pattern in enumerate(patterns):
            best = max(float(row["ratio"]) for row in found if row["shape"] == shape and row["pattern"] == pattern)
            size = 220 * best / (top + 1)
            x = 50 + 110 * i + 22 * j
            parts.append(f'<rect x="{x}" y="{250 - size:.0f}" width="20" height="{size:.0f}" fill="{colours[j]}"/>')
            parts.append(f'<text x="{x}" y="{246 - size:.0f}" font-size="9">{best:.1f}</text>')
        parts.append(f'<text x="{50 + 110 * i}" y="266" font-size="9">{shape}</text>')
    one = 250 - 220 / (top + 1)
    parts.append(f'<line x1="40" x2="{width}" y1="{one:.0f}" y2="{one:.0f}" stroke="#cc3311" stroke-dasharray="4"/>')
    for j, pattern in enumerate(patterns):
        parts.append(
            f'<rect x="{60 + 70 * j}" y="280" width="10" height="10" fill="{colours[j]}"/>'
            f'<text x="{74 + 70 * j}" y="289">{pattern}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    rows = read(sys.argv[1:])
    page = PAGE.read_text()
    for name, lines in (("masks", masks(rows)), ("linear", linear(rows)), ("models", models(rows))):
        table = "\n".join(lines)
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S
        )
    PAGE.write_text(page)
    for threads in dict.fromkeys(row["threads"] for row in rows):
        (PAGE.parent / f"performance-{threads}.svg").write_text(plot(rows, threads))


if __name__ == "__main__":
    main()
