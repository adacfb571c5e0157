"""The GPU tables of docs/performance-details.md, from CSV files of benchmarks/gpu.py."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance-details.md"
NONE = "Not yet measured: no GPU was at hand."
Row = Mapping[str, str]


def line(row: Mapping[str, object]) -> str:
    """A row as it is printed while a benchmark runs."""
    share = f"  {float(str(row['share'])):.0%} of copy" if row["share"] else ""
    name = f"{row['section']:9} {row['shape']:18} {row['pattern']:6} {row['dtype']:9} {row['impl']:26}"
    return f"{name} {float(str(row['p50_us'])):10.1f} us  x{float(str(row['ratio'])):.2f} of {row['baseline']}{share}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def times(row: Row) -> str:
    """Median and percentiles in microseconds."""
    p20, p50, p80 = (float(row[name]) for name in ("p20_us", "p50_us", "p80_us"))
    return f"{p50:.1f} [{p20:.1f}, {p80:.1f}]"


def masks(rows: Sequence[Row]) -> str:
    """Share of the copy bandwidth; a dash for what failed."""
    lines = []
    for dtype, pattern in dict.fromkeys((row["dtype"], row["pattern"]) for row in rows):
        here = {row["impl"]: row for row in rows if (row["dtype"], row["pattern"]) == (dtype, pattern)}
        shares = [
            f"{float(here[name]['share']):.2f}" if name in here else "-" for name in ("prune", "mask", "SR-STE term")
        ]
        both = "reference" in here and "mask" in here
        slower = f"{float(here['reference']['p50_us']) / float(here['mask']['p50_us']):.0f}" if both else "-"
        lines.append([pattern, dtype, here["copy"]["note"], *shares, slower])
    return table(["pattern", "dtype", "copy", "prune", "mask", "SR-STE term", "reference over mask"], lines)


def against(rows: Sequence[Row]) -> str:
    """Every variant with its ratio to the best dense one."""
    header = ["shape", "dtype", "pattern", "variant", "us, p50 [p20, p80]", "times faster", "than", "note"]
    first, last = ("shape", "dtype", "pattern", "impl"), ("baseline", "note")
    lines = [
        [*(row[name] for name in first), times(row), f"{float(row['ratio']):.2f}", *(row[name] for name in last)]
        for row in rows
    ]
    return table(header, lines)


def training(rows: Sequence[Row]) -> str:
    """Steps over the dense step."""
    lines = [[row["shape"], row["impl"], times(row), f"{1 / float(row['ratio']):.3f}"] for row in rows]
    return table(["network", "step", "us, p50 [p20, p80]", "over dense"], lines)


TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "masks": masks,
    "lists": against,
    "linear": against,
    "decode": against,
    "training": training,
    "models": against,
}


def write(files: Sequence[Path], page: Path) -> None:
    """Put the tables of runs between `<!-- gpu NAME -->` and `<!-- end -->`, with GPU, versions, date. Sections that
    no run has measured stay as they are."""
    rows = combined(files)
    text = page.read_text()
    for name, made in TABLES.items():
        here = [row for row in rows if row["section"] == name]
        if here:
            about = dict.fromkeys(", ".join(row[each] for each in ("gpu", "versions", "date")) for row in here)
            text = between(text, f"<!-- gpu {name} -->\n", f"\n{'; '.join(about)}.\n\n{made(here)}\n\n", page)
    page.write_text(text)


def combined(files: Sequence[Path]) -> list[Row]:
    """The rows of several runs. A case that was measured again counts as the last of these files has it, whole: a ratio
    compares numbers of one run."""
    found: dict[tuple[str, str], list[Row]] = {}
    for file in files:
        cases: dict[tuple[str, str], list[Row]] = {}
        with file.open(newline="") as opened:
            for row in csv.DictReader(opened):
                cases.setdefault((row["section"], row["case"]), []).append(row)
        found |= cases
    return [row for case in found.values() for row in case]


def between(text: str, start: str, new: str, page: Path, end: str = "<!-- end -->") -> str:
    """The page with other text after a line, up to the next line `end`."""
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page} has no line {start.strip()}; needed one, and {end} after it")
    return before + start + new + end + after
