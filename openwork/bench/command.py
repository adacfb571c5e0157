"""`openwork bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openwork.bench import operators
from openwork.bench.forward import Job, forward_pass
from openwork.bench.measure import BenchRow, roofline, write_csv
from openwork.engines.case import PRECISIONS, in_dtype
from openwork.engines.engine import ENGINES, engines_named
from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted
from openwork.utils.table import aligned

PATTERNS = ("2:4", "1:4", "1:8", "1:16")
SHAPES = (
    (256, 1024, 1024),
    (256, 2048, 2048),
    (128, 4096, 4096),
    (16, 2048, 2048),
    (4, 2048, 2048),
    (1, 2048, 2048),
    (1, 4096, 4096),
)
"""(B, K, O)."""
GROWTH = {
    "batch": [(2**i, 2048, 2048) for i in range(10)],
    "width": [(128, 2**i, 2**i) for i in range(8, 13)],
}
"""What grows -> (B, K, O)."""


Build = Callable[[str, argparse.Namespace, int], tuple[nn.Module, Any, Sequence[Any]]]
"""What gives a model by its name on the command line, an example of a batch, and batches to calibrate int8 by."""

_ABOUT = """\
Run benchmarks, print a table, write CSV.

A model is run dense in every engine that is installed (torch eager, in channels_last and compiled; OpenVINO; ONNX
Runtime), and at each of --patterns as ow.deploy makes it; each in a process of its own, in turns, on the same threads.
The baseline is the fastest engine of all that round no more."""


def bench(words: Sequence[str], build: Build, add_arguments: Callable[[argparse.ArgumentParser], None]) -> int:
    """Run benchmarks, print a table, write CSV."""
    parser = argparse.ArgumentParser(
        "openwork bench", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = (
        "masks, linear, threads, growth, or a model: as in `openwork plan`, such as resnet50 (default: the first three)"
    )
    add("what", nargs="*", default=["masks", "linear", "threads"], help=known)
    add_arguments(parser)
    add("--patterns", nargs="+", default=PATTERNS, metavar="N:M")
    add("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    add("--batches", nargs="+", type=int, default=[1, 8], help="of whole models")
    precisions = "of whole models: of weights, and in other engines of activations (default: float32)"
    add("--precision", nargs="+", choices=PRECISIONS, default=["float32"], help=precisions)
    names = [engine.name for engine in ENGINES]
    add("--engines", nargs="+", default=names, metavar="NAME", help=f"of whole models, of {', '.join(names)} (all)")
    add(
        "--seconds",
        type=float,
        default=5.0,
        help="for each group of variants that take turns; of whole models for each",
    )
    add("--no-compile", action="store_true", help="leave out what torch.compile makes of whole models")
    add("--eager", action="store_true", help="deployed networks as they are alone, not compiled as well")
    add("--memory", action="store_true", help="of whole models: bytes held, and a process's peak")
    add("--out", type=Path, default=Path("bench.csv"))
    asked = parser.parse_args(words)
    engines_named(asked.engines)
    found: list[BenchRow] = []
    for threads in sorted(set(asked.threads)):
        torch.set_num_threads(threads)
        for what in asked.what:
            found += _run(what, asked, build)
            write_csv(asked.out, BenchRow, found)  # after each: what was measured is not lost
    print(f"{counted(len(found), 'row')}: {asked.out.resolve()}")
    return 0


def _run(what: str, asked: argparse.Namespace, build: Build) -> list[BenchRow]:
    patterns = [Pattern.parse(each) for each in asked.patterns]
    rows: list[BenchRow] = []
    with torch.inference_mode():
        if what == "masks":
            rows += operators.time_masks(roofline(), patterns, asked.seconds)
        elif what == "linear":
            rows += operators.time_linear(roofline(), SHAPES, patterns, asked.seconds)
        elif what == "growth":
            rows += operators.growth(roofline(), GROWTH, patterns, asked.seconds)
        elif what == "threads":
            times = operators.layers_alternating(asked.seconds)
            over = times["in turn"] / (times["sparse"] + times["dense"]) - 1
            threads = counted(torch.get_num_threads(), "thread")
            print(f"{threads}: sparse and dense layers in turn cost {over:+.1%} over their sum")
    if what not in ("masks", "linear", "growth", "threads"):
        rows += _whole(what, patterns, asked, build)
    if rows:
        print("\n".join(aligned(*bench_table(rows))), flush=True)
    return rows


def _whole(name: str, patterns: Sequence[Pattern], asked: argparse.Namespace, build: Build) -> list[BenchRow]:
    """Rows of a model; what could not be run is said in a line."""
    engines = [each for each in engines_named(asked.engines) if each.name != "compiled" or not asked.no_compile]
    found = []
    for batch in asked.batches:
        model, example, calibration = build(name, asked, batch)
        job = Job(
            name,
            f"batch {batch}",
            model.float(),
            in_dtype(example, torch.float32),
            patterns,
            asked.precision,
            engines,
            compiled=not (asked.no_compile or asked.eager),
            memory=asked.memory,
            calibration=calibration,
        )
        with torch.no_grad():
            for each in forward_pass(job, asked.seconds):
                if isinstance(each, BenchRow):
                    found.append(each)
                else:
                    print(each, flush=True)
    return found


def bench_table(rows: Sequence[BenchRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, for printing."""
    header = [
        "op",
        "shape",
        "impl",
        "threads",
        "p50 us",
        "p20..p80",
        "x baseline",
        "p20..p80",
        "baseline",
        "differs",
        "of bound",
        "MB held, +process",
    ]
    return header, [_cells(row) for row in rows]


def _cells(r: BenchRow) -> list[str]:
    times = [f"{r.p50_us:.0f}", f"{r.p20_us:.0f}..{r.p80_us:.0f}", f"{r.ratio:.2f}"]
    spread = "-" if math.isnan(r.ratio_p20) else f"{r.ratio_p20:.2f}..{r.ratio_p80:.2f}"
    apart = "-" if math.isnan(r.difference) else f"{r.difference:.0e}"
    share = "-" if math.isnan(r.roofline) else f"{r.roofline:.0%}"
    size = "-" if math.isnan(r.held_bytes) else f"{r.held_bytes / 1e6:.1f}, +{r.grown_bytes / 1e6:.1f}"
    return [r.op, r.shape, r.impl, str(r.threads), *times, spread, r.baseline, apart, share, size]
