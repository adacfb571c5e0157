"""The table that onnx_runtime.py measures, in docs/deploy/onnxruntime.md.

python benchmarks/onnx_runtime_table.py
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "deploy" / "onnxruntime.md"
PATTERNS, PRECISIONS = ("2:4", "1:4", "1:8"), ("float32", "int8")
OURS, DEPLOYED = "ONNX Runtime, ours", "ow.deploy, compiled"
DENSE = ("ONNX Runtime, dense", "OpenVINO, dense")
NETWORKS = {
    "bert": "6 layers of BERT-base, 128 tokens",
    "minilm": "MiniLM-L6, trained, 16 sentences of 32 tokens",
    "resnet50": "ResNet-50",
}


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """A line for each row: milliseconds of each way, and how many times faster ours is than the fastest dense one."""
    ways = (OURS, DEPLOYED, *DENSE)
    header = ["network", "precision", "pattern", "file, dense", "first output, torch", *ways, "ours, times as fast"]
    made = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    key = ("network", "precision", "pattern")
    for each in sorted({tuple(line[name] for name in key) for line in lines}, key=_order):
        by_way = {line["way"]: line for line in lines if tuple(line[name] for name in key) == each}
        times = [f"{float(by_way[way]['p50_ms']):.1f}" if way in by_way else "" for way in ways]
        own, dense, deployed = (by_way.get(way) for way in (OURS, DENSE[0], DEPLOYED))
        ratio = "{} [{}, {}]".format(*(f"{float(own[f'ratio_p{p}']):.2f}" for p in (50, 20, 80))) if own else ""
        sizes = ", ".join(f"{int(line['file_bytes']) / 1e6:.1f} MB" for line in (own, dense) if line)
        first = ", ".join(f"{float(line['first_s']):.1f} s" for line in (own, deployed) if line)
        if deployed and deployed["note"]:
            times[1] += " (dense)"
        made.append(f"| {' | '.join([NETWORKS[each[0]], *each[1:], sizes, first, *times, ratio])} |")
    software = ", ".join(sorted({line["software"] for line in lines}))
    dates = sorted({line["date"] for line in lines})
    where = f"{lines[0]['machine']}, {lines[0]['threads']} thread; {software}; {dates[-1]}."
    return "\n".join([*made, "", where])


def _order(row: tuple[str, ...]) -> tuple[int, ...]:
    network, precision, pattern = row
    return [*NETWORKS].index(network), PRECISIONS.index(precision), PATTERNS.index(pattern)


def with_tables(page: str) -> str:
    """The page with the table of each file that it names between `<!-- onnxruntime NAME -->` and `<!-- end -->`; what
    was not measured stays as it is."""
    start, end = "<!-- onnxruntime ", "<!-- end -->"
    parts = page.split(start)
    for i, part in enumerate(parts[1:], 1):
        name, rest = part.split(" -->", 1)
        path = RESULTS / f"onnxruntime-{name}.csv"
        if not path.exists():
            continue
        lines = list(csv.DictReader(path.open(newline="")))
        parts[i] = f"{name} -->\n\n{table(lines)}\n\n{end}{rest.split(end, 1)[1]}"
    return start.join(parts)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
