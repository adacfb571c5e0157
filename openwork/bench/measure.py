"""Rows of a benchmark: times beside those of the baseline in the same run, and the share of what the machine can do."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import openwork.kernels as kernels
from openwork.kernels.cpu.native import isa
from openwork.utils.hardware import cpu_model
from openwork.utils.timing import take_turns


@dataclass(frozen=True)
class BenchRow:
    """One variant of one operator. Times in microseconds: 20th, 50th and 80th percentile. `ratio` is the baseline's
    median over this median: above 1 where this is faster. `bound_us` is what the machine's peak and bandwidth allow,
    the larger of operations over peak and bytes over bandwidth, and `roofline` its share of the median. Of whole models
    `held_bytes` are their parameters and buffers, and `grown_bytes` by how much the peak of a fresh process grew while
    it loaded the model and ran it once; `ratio_p20` and `ratio_p80` are percentiles of the ratios of single rounds,
    `engine` is what ran, with its version, and `difference` how far its outputs are from torch's in float32, as a share
    of the largest."""

    op: str
    shape: str
    pattern: str
    dtype: str
    impl: str
    p20_us: float
    p50_us: float
    p80_us: float
    baseline: str
    baseline_p50_us: float
    ratio: float
    bound_us: float
    roofline: float
    threads: int
    machine: str
    isa: str
    torch: str
    openwork: str
    date: str
    held_bytes: float = float("nan")
    grown_bytes: float = float("nan")
    ratio_p20: float = float("nan")
    ratio_p80: float = float("nan")
    engine: str = ""
    difference: float = float("nan")


@dataclass(frozen=True)
class Roofline:
    """What one run found this machine to do, on the threads in use: float32 operations and copied bytes a second."""

    flops: float
    bandwidth: float

    def bound(self, flops: float, size: float) -> float:
        """The least seconds for so many operations on so many bytes."""
        return max(flops / self.flops, size / self.bandwidth)


def roofline() -> Roofline:
    """Peak of the multiply-add loop (times the threads), and of moving 128 MiB: copying, both ways counted, or a dot
    product, whichever is faster."""
    here, best = isa(), 0.0
    result = torch.full((64,), 0.5)
    for _ in range(5):
        if here is None:
            break
        start = time.perf_counter()
        done = here.lib.openwork_peak(here.kernels, 2_000_000, result.data_ptr())
        best = max(best, done / (time.perf_counter() - start))
    source = torch.zeros(32 * 2**20)
    target = torch.empty_like(source)
    copying = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    reading = min(_seconds(lambda: torch.dot(source, target)) for _ in range(5))
    return Roofline(best * torch.get_num_threads() or float("nan"), 2 * source.nbytes / min(copying, reading))


def alternating(variants: Mapping[str, Callable[[], object]], *, seconds: float, flush: bool) -> dict[str, list[float]]:
    """Times of each, in seconds. They take turns; `flush` writes through the caches before each, so that none finds its
    data there."""
    waste = torch.zeros(16 * 2**20) if flush else None
    before = None if waste is None else partial(waste.add_, 1)
    return take_turns(variants, seconds, least=5, most=100, before=before)


def rows(
    op: str,
    shape: str,
    times: Mapping[str, list[float]],
    baselines: Iterable[str],
    about: Mapping[str, tuple[str, str]],
    bounds: Mapping[str, float],
    memory: Mapping[str, tuple[int, int]] | None = None,
) -> list[BenchRow]:
    """One row for each variant, against the fastest of `baselines`. `about`: variant -> (pattern, dtype); `memory`:
    variant -> (held, grown)."""
    medians = {name: statistics.median(each) for name, each in times.items()}
    best = min(baselines, key=lambda name: medians[name])
    made = []
    for name, each in times.items():
        p20, p50, p80 = (1e6 * q for q in (quantile(each, 0.2), medians[name], quantile(each, 0.8)))
        bound, (pattern, dtype) = bounds.get(name, float("nan")), about.get(name, ("dense", "float32"))
        against = (best, 1e6 * medians[best], medians[best] / medians[name])
        limit = (1e6 * bound, bound / medians[name])
        held, grown = (memory or {}).get(name, (float("nan"), float("nan")))
        where = {**_where(), "held_bytes": held, "grown_bytes": grown}
        made.append(BenchRow(op, shape, pattern, dtype, name, p20, p50, p80, *against, *limit, **where))
    return made


def quantile(values: list[float], share: float) -> float:
    """The value below which a share of them lies, the nearest there is.

    >>> quantile([3.0, 1.0, 2.0], 0.5)
    2.0
    """
    return sorted(values)[round(share * (len(values) - 1))]


def write_csv(path: Path, kind: type[Any], found: Iterable[Any]) -> None:
    """All rows, dataclasses of one kind, as CSV with a header, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(kind)])
        writer.writeheader()
        for row in found:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _where() -> dict[str, Any]:
    version = importlib.metadata.version("openwork")
    here = {"threads": torch.get_num_threads(), "machine": cpu_model(), "isa": kernels.status().isa or "none"}
    return here | {"torch": torch.__version__, "openwork": version, "date": today()}
