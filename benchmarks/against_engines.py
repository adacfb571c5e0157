"""Measure the table of docs/performance.md: networks as deployed, against the fastest dense engine; or write it.

    python benchmarks/against_engines.py run --name xeon            # 25 minutes on a quiet machine; needs openvino, ...
    python benchmarks/against_engines.py table                      # pip install openvino onnxruntime onnx onnxscript

`run` calls `openwork bench` for one row after the other, the command printed, and keeps all of its rows in
benchmarks/results/engines-NAME.csv; no row begins after --minutes. `table` writes a table for each such file between
the lines `<!-- engines NAME -->` and `<!-- end -->` of the pages that have them.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openwork.cli.main import main as openwork

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "performance-details.md")
PATTERNS = ("2:4", "1:4", "1:8", "1:16")


@dataclass(frozen=True)
class Row:
    """One line of the table: what is given to `openwork bench`. `compiled`: the deployed network as well, which takes
    minutes."""

    network: str
    precision: str = "float32"
    batch: int = 1
    threads: int = 1
    patterns: Sequence[str] = PATTERNS
    compiled: bool = False

    def words(self, out: Path) -> list[str]:
        """Of the command line."""
        words = ["bench", self.network, "--precision", self.precision, "--batches", str(self.batch)]
        words += ["--threads", str(self.threads), "--patterns", *self.patterns, "--seconds", "3", "--out", str(out)]
        words += [] if self.compiled else ["--eager"]
        return words + (["--input", "1x3x224x224"] if ":" in self.network else [])


ROWS = (
    Row("bert"),
    Row("resnet50", compiled=True),
    Row("bert", "int8", patterns=("2:4", "1:4")),
    Row("resnet50", "int8", patterns=("2:4", "1:4")),
    Row("bert", batch=8, threads=2, patterns=("2:4", "1:4", "1:16")),
    Row("resnet50", batch=8, threads=2, patterns=("2:4", "1:4", "1:16")),
    Row("timm.models:vit_base_patch16_224", patterns=("2:4", "1:4")),
    Row("timm.models:convnext_tiny", patterns=("2:4", "1:4")),
    Row("bert", "bfloat16", patterns=("2:4", "1:4")),
    Row("resnet50", "bfloat16", patterns=("2:4", "1:4")),
)
"""The most telling first."""

NAMES = {
    "bert": "6 layers of BERT-base, 128 tokens",
    "resnet50": "ResNet-50",
    "timm.models:vit_base_patch16_224": "ViT-B/16 (timm)",
    "timm.models:convnext_tiny": "ConvNeXt-T (timm)",
}


def run(name: str, minutes: float, rows: Sequence[Row] = ROWS) -> None:
    """Measure row by row, and keep what there is after each."""
    start, found = time.monotonic(), list[dict[str, str]]()
    target = RESULTS / f"engines-{name}.csv"
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "bench.csv"
        for row in rows:
            spent = (time.monotonic() - start) / 60
            if spent > minutes:
                print(f"left out after {spent:.0f} minutes: {row}", flush=True)
                continue
            if row.precision == "bfloat16" and not multiplies_bfloat16():
                print(f"left out, this processor does not multiply bfloat16: {row}", flush=True)
                continue
            print(f"{spent:.1f} minutes: openwork {shlex.join(row.words(Path('bench.csv')))}", flush=True)
            if openwork(row.words(part)):
                continue  # the error is printed
            found += list(csv.DictReader(part.open(newline="")))
            with target.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(found[0]))
                writer.writeheader()
                writer.writerows(found)


def multiplies_bfloat16(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has such instructions; True where nobody says."""
    return not info.exists() or bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", info.read_text()))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each network, batch and precision: the fastest dense engine, and how many times faster each pattern
    is; and what it was measured on."""
    used = [pattern for pattern in PATTERNS if any(row["pattern"] == pattern for row in rows)]
    header = ["network", "batch, threads", "precision", "fastest dense", *used]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    keys = ("op", "shape", "threads", "dtype")
    for key in dict.fromkeys(tuple(row[each] for each in keys) for row in rows):
        here = [row for row in rows if tuple(row[each] for each in keys) == key]
        op, shape, threads, precision = key
        dense = f"{float(here[0]['baseline_p50_us']) / 1e3:.1f} ms, {here[0]['baseline'].removeprefix('dense ')}"
        cells = [_fastest(row for row in here if row["pattern"] == pattern) for pattern in used]
        batch = f"{shape.removeprefix('batch ')}, {threads}"
        lines.append(f"| {NAMES.get(op, op)} | {batch} | {precision} | {dense} | {' | '.join(cells)} |")
    software = sorted({row["engine"] for row in rows} | {f"torch {row['torch']}" for row in rows})
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    where = f"{rows[0]['machine']}, {rows[0]['isa']}; {', '.join(software)}; {when}."
    return "\n".join([*lines, "", where])


def _fastest(rows: Iterable[Mapping[str, str]]) -> str:
    """The ratio of the faster way to run a pattern, with its percentiles where rounds were kept; a c where that is the
    compiled one."""
    best = max(rows, key=lambda row: float(row["ratio"]), default=None)
    if best is None:
        return ""
    spread = "" if best["ratio_p20"] == "nan" else f" [{float(best['ratio_p20']):.2f}, {float(best['ratio_p80']):.2f}]"
    return f"{float(best['ratio']):.2f}{spread}" + (" c" if best["impl"].endswith("compiled") else "")


def with_tables(page: str) -> str:
    """The page with the table of every file that it names."""

    def made(match: re.Match[str]) -> str:
        rows = list(csv.DictReader((RESULTS / f"engines-{match[1]}.csv").open(newline="")))
        return f"<!-- engines {match[1]} -->\n\n{table(rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- engines ([\w-]+) -->\n.*?<!-- end -->", made, page, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--name", required=True, help="of the machine, in the name of the file")
    running.add_argument("--minutes", type=float, default=20.0, help="after which no row begins")
    running.add_argument("--rows", nargs="+", type=int, default=range(len(ROWS)), help="which, from 0 (all)")
    commands.add_parser("table")
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.name, asked.minutes, [ROWS[i] for i in asked.rows])
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
