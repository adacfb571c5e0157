"""`openwork bench` and `openwork plan`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from openwork.bench import models, operators
from openwork.bench.measure import Row, roofline, write_csv
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


def bench(words: Sequence[str]) -> int:
    """Run benchmarks, print a table, write CSV."""
    parser = argparse.ArgumentParser("openwork bench", description=bench.__doc__)
    add = parser.add_argument
    known = (
        "masks, linear, threads, growth, encoder, or a model of torchvision such as resnet50 (default: the first three)"
    )
    add("what", nargs="*", default=["masks", "linear", "threads"], help=known)
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
    found: list[Row] = []
    for threads in sorted(set(asked.threads)):
        torch.set_num_threads(threads)
        for what in asked.what:
            found += _run(what, asked)
            write_csv(asked.out, Row, found)  # after each: what was measured is not lost
    print(f"{len(found)} rows: {asked.out.resolve()}")
    return 0


def _run(what: str, asked: argparse.Namespace) -> list[Row]:
    patterns = [Pattern.parse(each) for each in asked.patterns]
    rows: list[Row] = []
    with torch.inference_mode():
        if what == "masks":
            rows += operators.masks(roofline(), patterns, asked.seconds)
        elif what == "linear":
            rows += operators.linear(roofline(), SHAPES, patterns, asked.seconds)
        elif what == "growth":
            rows += operators.growth(roofline(), GROWTH, patterns, asked.seconds)
        elif what == "threads":
            times = operators.layers_alternating(asked.seconds)
            over = times["in turn"] / (times["sparse"] + times["dense"]) - 1
            print(f"{torch.get_num_threads()} threads: sparse and dense layers in turn cost {over:+.1%} over their sum")
    if what not in ("masks", "linear", "growth", "threads"):
        weight_dtypes = [getattr(torch, each) for each in asked.weight_dtype or [asked.dtype]]
        given = {"seconds": asked.seconds, "compiled": not asked.no_compile, "dtype": getattr(torch, asked.dtype)}
        passes = models.forward_passes(what, asked.batches, patterns, weight_dtypes, **given)
        with torch.no_grad():  # weights of inference mode cannot be frozen by a compiler
            for each in passes:
                if isinstance(each, Row):
                    rows.append(each)
                else:
                    print(f"{len(each.chosen)} of {len(each.layers)} weights sparse", flush=True)
    if rows:
        print("\n".join(aligned(*table(rows))), flush=True)
    return rows


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
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


def _cells(r: Row) -> list[str]:
    times = [f"{r.p50_us:.0f}", f"{r.p20_us:.0f}..{r.p80_us:.0f}", f"{r.ratio:.2f}"]
    share = "-" if math.isnan(r.roofline) else f"{r.roofline:.0%}"
    size = "-" if math.isnan(r.held_bytes) else f"{r.held_bytes / 1e6:.1f}, +{r.grown_bytes / 1e6:.1f}"
    return [r.op, r.shape, r.impl, str(r.threads), *times, r.baseline, share, size]


def plan(words: Sequence[str]) -> int:
    """Time every layer of a model on this machine, dense and sparse, and print what `ow.deploy` would choose."""
    parser = argparse.ArgumentParser("openwork plan", description=plan.__doc__)
    add = parser.add_argument
    add("model", help="a model of torchvision, built from its name with random weights, or encoder")
    add("--file", help="weights written by ow.save, instead of random ones projected to --pattern")
    add("--pattern", default="2:4", metavar="N:M")
    add("--batch", type=int, default=1)
    kept = "dtype of the sparse weights (default: float32 on a CPU, bfloat16 on a GPU, where the model is in it)"
    add("--weight-dtype", choices=["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"], help=kept)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(words)
    if torch.device(asked.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: torch {torch.__version__} sees no GPU here")
    torch.set_num_threads(asked.threads)
    from openwork.files.checkpoint import load
    from openwork.inference.deploy import plan as measure
    from openwork.training.sparsify import project

    model, example = models.build(asked.model, asked.batch)
    if asked.file:
        load(asked.file, into=model)
    else:
        project(model, asked.pattern)
    if asked.device != "cpu":
        model, example = model.to(asked.device, torch.bfloat16), example.to(asked.device, torch.bfloat16)
    weight_dtype = getattr(torch, asked.weight_dtype) if asked.weight_dtype else None
    print(measure(model, example, pattern=None if asked.file else asked.pattern, weight_dtype=weight_dtype))
    return 0
