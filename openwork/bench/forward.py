"""Benchmarks of whole networks: a forward pass as deployed, beside every engine that runs the dense one here."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openwork.bench import models
from openwork.bench.measure import BenchRow, quantile, rows
from openwork.engines.case import PRECISIONS, Case, Refused, write_module, write_program
from openwork.engines.engine import ENGINES, Engine
from openwork.engines.worker import Worker, in_rounds
from openwork.inference.fold import fold_batch_norm
from openwork.nm.pattern import Pattern
from openwork.training.sparsify import project
from openwork.utils.counted import counted

ROUNDS = 7
"""In each, all take their turn: a ratio for each round, whose spread is told."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One call of a worker, and how its row names it."""

    impl: str
    pattern: str
    precision: str
    worker: Worker
    call: str = ""
    held: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured of one network at one batch. `calibration`: inputs like the example, by which int8 scales are
    chosen."""

    name: str
    shape: str
    model: nn.Module
    example: Any
    patterns: Sequence[Pattern]
    precisions: Sequence[str] = ("float32",)
    engines: Sequence[Engine] = ENGINES
    compiled: bool = True
    memory: bool = False
    calibration: Sequence[Any] = ()


def forward_pass(job: Job, seconds: float, rounds: int = ROUNDS) -> Iterator[BenchRow | str]:
    """A row for each way to run the network, about `seconds` each, in turns; as text what could not be run, and why.

    Each is a process of its own, on as many threads as torch has here. "dense" is the fastest engine of all that round
    no more than the row: of a row in float32 those in float32, of one in int8 all."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder, threads, entries = Path(place), torch.get_num_threads(), list[Entry]()
        for one in _dense(job, folder, threads, stack):
            if isinstance(one, str):
                yield f"{job.name}, {job.shape}: {one}"
            else:
                entries.append(one)
        for pattern in job.patterns:
            sparse = copy.deepcopy(job.model)
            project(sparse, pattern)
            own = folder / str(pattern).replace(":", "of")
            own.mkdir()
            write_module(own, sparse, job.example)
            if job.calibration:
                torch.save([*job.calibration], own / "calibrate.pt")
            for precision in job.precisions:
                for two in _deployed(job, Case(own, precision, threads), pattern, stack):
                    if isinstance(two, str):
                        yield f"{job.name}, {job.shape}, {pattern} {precision}: {two}"
                    else:
                        entries.append(two)
        turns = {entry.impl: partial(entry.worker.turn, entry.call) for entry in entries}
        yield from as_rows(job, entries, in_rounds(turns, seconds, rounds))


def _dense(job: Job, folder: Path, threads: int, stack: ExitStack) -> Iterator[Entry | str]:
    """The dense network in every engine, or why not."""
    dense = copy.deepcopy(job.model)
    fold_batch_norm(dense, job.example)
    write_module(folder, dense, job.example)
    held = models.memory(dense, job.example) if job.memory else None
    present = [engine for engine in job.engines if not engine.missing()]
    yield from (engine.missing() for engine in job.engines if engine not in present)
    reason = ""
    if any(engine.reads_onnx for engine in present):
        strictest = max(job.precisions, key=PRECISIONS.index)
        try:
            write_program(folder, dense, job.example, job.calibration)
            Worker("openwork.engines.onnx_files:write_onnx", Case(folder, strictest, threads)).close()
        except Refused as refusal:
            reason = str(refusal)
            yield f"no ONNX: {reason}"
    for precision in job.precisions:
        for engine in (each for each in present if not (reason and each.reads_onnx)):
            impl = f"dense {engine.name}" + ("" if precision == "float32" else f" {precision}")
            if precision not in engine.precisions:
                yield f"{impl}: it has no such products"
                continue
            try:
                worker = stack.enter_context(Worker(engine.prepare, Case(folder, precision, threads)))
            except Refused as refusal:
                yield f"{impl}: {refusal}"
                continue
            yield Entry(impl, "dense", precision, worker, held=held if impl == "dense eager" else None)


def _deployed(job: Job, case: Case, pattern: Pattern, stack: ExitStack) -> Iterator[Entry | str]:
    """The sparse network as deployed, and compiled."""
    options = {"pattern": str(pattern), "compiled": job.compiled, "keep": job.memory}
    try:
        case = dataclasses.replace(case, options=options)
        worker = stack.enter_context(Worker("openwork.bench.deployed:deployed", case, 1800))
    except Refused as refusal:
        yield str(refusal)
        return
    yield f"{worker.about['sparse']} of {counted(worker.about['weights'], 'weight')} sparse"
    held = models.memory(*_kept(case.folder)) if job.memory else None
    short = f"deployed {pattern} {case.precision}"
    for call in worker.names:
        yield Entry(f"{short} {call}".strip(), str(pattern), case.precision, worker, call, None if call else held)


def _kept(folder: Path) -> tuple[nn.Module, Any]:
    found: tuple[nn.Module, Any] = torch.load(folder / "deployed.pt", weights_only=False)
    return found


def as_rows(job: Job, entries: Sequence[Entry], times: dict[str, list[list[float]]]) -> Iterator[BenchRow]:
    """Rows of each precision against the fastest dense engine that rounds no more."""
    by_name = {entry.impl: entry for entry in entries}
    about = {entry.impl: (entry.pattern, entry.precision) for entry in entries}
    held = {entry.impl: entry.held for entry in entries if entry.held}
    flat = {name: [run for each in found for run in each] for name, found in times.items()}
    for precision in job.precisions:
        rounds_no_more = PRECISIONS[: PRECISIONS.index(precision) + 1]
        baselines = [each.impl for each in entries if each.pattern == "dense" and each.precision in rounds_no_more]
        if not baselines:
            raise ValueError(f"no engine runs {job.name} dense in {precision} or better: there is nothing to compare")
        for row in rows(job.name, job.shape, flat, baselines, about, {}, held):
            if row.dtype != precision:
                continue
            entry = by_name[row.impl]
            pairs = zip(times[row.baseline], times[row.impl], strict=True)
            ratios = [quantile(dense, 0.5) / quantile(own, 0.5) for dense, own in pairs]
            yield dataclasses.replace(
                row,
                ratio_p20=quantile(ratios, 0.2),
                ratio_p80=quantile(ratios, 0.8),
                engine=entry.worker.version,
                difference=entry.worker.difference[entry.call],
            )
