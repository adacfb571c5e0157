"""`openwork bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from openwork.bench import models, operators
from openwork.bench.measure import BenchRow, roofline, write_csv
from openwork.nm.pattern import Pattern
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


Build = Callable[[str, argparse.Namespace, int], tuple[nn.Module, torch.Tensor]]
"""What gives a model by its name on the command line, and an example of a batch."""


def bench(words: Sequence[str], build: Build, add_arguments: Callable[[argparse.ArgumentParser], None]) -> int:
    """Run benchmarks, print a table, write CSV."""
    parser = argparse.ArgumentParser("openwork bench", description=bench.__doc__)
    add = parser.add_argument
    known = (
        "masks, linear, threads, growth, or a model: as in `openwork plan`, such as resnet50 (default: the first three)"
    )
    add("what", nargs="*", default=["masks", "linear", "threads"], help=known)
    add_arguments(parser)
    add("--patterns", nargs="+", default=PATTERNS, metavar="N:M")
    add("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    add("--batches", nargs="+", type=int, default=[1, 8], help="of whole models")
    add(
        "--weight-dtype",
        nargs="+",
        choices=["float32", "bfloat16", "int8"],
        help="of whole models (default: their own dtype)",
    )
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of whole models, their own")
    add("--seconds", type=float, default=5.0, help="for each group of variants that take turns")
    add("--no-compile", action="store_true", help="leave out what torch.compile makes of whole models")
    add("--out", type=Path, default=Path("bench.csv"))
    asked = parser.parse_args(words)
    found: list[BenchRow] = []
    for threads in sorted(set(asked.threads)):
        torch.set_num_threads(threads)
        for what in asked.what:
            found += _run(what, asked, build)
            write_csv(asked.out, BenchRow, found)  # after each: what was measured is not lost
    print(f"{len(found)} rows: {asked.out.resolve()}")
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
            print(f"{torch.get_num_threads()} threads: sparse and dense layers in turn cost {over:+.1%} over their sum")
    if what not in ("masks", "linear", "growth", "threads"):
        weight_dtypes = [getattr(torch, each) for each in asked.weight_dtype or [asked.dtype]]
        given = {"seconds": asked.seconds, "compiled": not asked.no_compile, "dtype": getattr(torch, asked.dtype)}
        passes = models.forward_passes(
            what, partial(build, what, asked), asked.batches, patterns, weight_dtypes, **given
        )
        with torch.no_grad():  # weights of inference mode cannot be frozen by a compiler
            for each in passes:
                if isinstance(each, BenchRow):
                    rows.append(each)
                else:
                    print(f"{len(each.chosen)} of {len(each.layers)} weights sparse", flush=True)
    if rows:
        print("\n".join(aligned(*bench_table(rows))), flush=True)
    return rows


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
        "baseline",
        "of bound",
        "MB held, +process",
    ]
    return header, [_cells(row) for row in rows]


def _cells(r: BenchRow) -> list[str]:
    times = [f"{r.p50_us:.0f}", f"{r.p20_us:.0f}..{r.p80_us:.0f}", f"{r.ratio:.2f}"]
    share = "-" if math.isnan(r.roofline) else f"{r.roofline:.0%}"
    size = "-" if math.isnan(r.held_bytes) else f"{r.held_bytes / 1e6:.1f}, +{r.grown_bytes / 1e6:.1f}"
    return [r.op, r.shape, r.impl, str(r.threads), *times, r.baseline, share, size]
