"""Write the tables and plots of docs/performance-details.md from the CSV files of `openwork bench`.

    openwork bench masks linear threads growth --threads 1 2 --out build/operators.csv
    python benchmarks/performance.py build/operators.csv            # needs matplotlib

Whole networks: against_engines.py. Tables are printed between the lines `<!-- NAME -->` of the page;
plots go to docs/performance-*.svg.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
from figures import save

PAGE = Path(__file__).parent.parent / "docs" / "performance-details.md"
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
                cells.append(f"{ratio(best)} ({float(best['roofline']):.0%}{_kernel(best)})")
            against = next(row for row in here if row["dtype"] == dtype)
            dense = f"{float(against['baseline_p50_us']):.0f}, {against['baseline']}"
            lines.append(
                f"| {', '.join(re.findall('[0-9]+', shape))} | {threads} | {dtype} | {dense} | {' | '.join(cells)} |"
            )
    return lines


def _kernel(row: Row) -> str:
    """The kernels that lanes of outputs have, by a letter: v for GEMV, d for dot products."""
    return {"gemv": " v", "dot_product": " d"}.get(row["impl"].split()[0], "")


def plot_bars(rows: list[Row], file: Path) -> None:
    """The float32 ratios by shape, a part for each number of threads: one colour a pattern, a line where dense is."""
    found = [row for row in rows if (row["op"], row["dtype"]) == ("linear", "float32") and row["pattern"] != "dense"]
    counts, patterns, shapes = (
        list(dict.fromkeys(row[key] for row in found)) for key in ("threads", "pattern", "shape")
    )
    figure, parts = plt.subplots(len(counts), 1, figsize=(9, 3.2 * len(counts)), squeeze=False, layout="constrained")
    for axes, threads in zip(parts[:, 0], counts, strict=True):
        for i, pattern in enumerate(patterns):
            best = [max(_values(found, "ratio", shape=shape, pattern=pattern, threads=threads)) for shape in shapes]
            bars = axes.bar([x + 0.2 * i for x in range(len(shapes))], best, 0.18, label=pattern, color=f"C{i + 1}")
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.margins(y=0.2)  # room for the legend
        axes.axhline(1, color="C0", linestyle=":", label="dense")
        axes.set_xticks([x + 0.3 for x in range(len(shapes))], [_lines(shape) for shape in shapes], fontsize=8)
        axes.set_ylabel(f"times faster, {_threads(threads)}")
    parts[0, 0].legend(ncols=len(patterns) + 1)
    save(figure, file)


def plot_growth(rows: list[Row], file: Path) -> None:
    """Time against batch and width, dense and sparse: a column for what grows, a row for each number of threads."""
    found = [row for row in rows if row["op"].startswith("growth with ")]
    counts, ops, patterns = (list(dict.fromkeys(row[key] for row in found)) for key in ("threads", "op", "pattern"))
    size = len(counts), len(ops)
    figure, parts = plt.subplots(
        *size, figsize=(9, 3.4 * len(counts)), squeeze=False, layout="constrained", sharex="col"
    )
    for (i, threads), (j, op) in product(enumerate(counts), enumerate(ops)):
        axes, here = parts[i, j], [row for row in found if (row["threads"], row["op"]) == (threads, op)]
        shapes = list(dict.fromkeys(row["shape"] for row in here))
        numbers = [[int(each) for each in re.findall("[0-9]+", shape)] for shape in shapes]
        grown = [B if op.endswith("batch") else K for B, K, _ in numbers]
        for k, pattern in enumerate(patterns):
            times = [min(_values(here, "p50_us", shape=shape, pattern=pattern)) for shape in shapes]
            axes.plot(grown, times, ":o" if pattern == "dense" else "-o", markersize=3, color=f"C{k}", label=pattern)
        axes.set(xscale="log", yscale="log", ylabel=f"us, {_threads(threads)}")
        axes.set_xticks(grown, grown, fontsize=7)
        axes.minorticks_off()
        B, K, _ = numbers[0]
        axes.set_xlabel(f"rows (inputs and outputs {K})" if op.endswith("batch") else f"inputs and outputs ({B} rows)")
    parts[0, 0].legend(fontsize=8)
    save(figure, file)


def _values(rows: list[Row], name: str, **where: str) -> list[float]:
    return [float(row[name]) for row in rows if where.items() <= row.items()]


def _lines(shape: str) -> str:
    rows, *weight = re.findall("[0-9]+", shape)
    return f"{rows} rows\n{' x '.join(weight)}" if rows != "1" else f"1 row\n{' x '.join(weight)}"


def _threads(count: str) -> str:
    return "1 thread" if count == "1" else f"{count} threads"


def main() -> None:
    rows = read(sys.argv[1:])
    page = PAGE.read_text()
    for name, lines in (("masks", masks(rows)), ("linear", linear(rows))):
        table = "\n".join(lines)
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S
        )
    PAGE.write_text(page)
    plot_bars(rows, PAGE.parent / "performance-linear.svg")
    plot_growth(rows, PAGE.parent / "performance-growth.svg")


if __name__ == "__main__":
    main()
