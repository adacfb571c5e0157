"""`openwork compare TASK`: methods side by side from the same seeds, each run in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from openwork.methods import METHODS
from openwork.recipes.config import CompareConfig, Config, differences, values_of
from openwork.recipes.json_files import to_json
from openwork.recipes.lock import locked
from openwork.recipes.method_flags import DENSE, defaults_of, is_sparse, names_of, options_of, starts_trained
from openwork.recipes.report import write_report
from openwork.recipes.rundir import RunDir, write_text
from openwork.recipes.summary import SummaryRow, headline, metrics_of, summary_rows
from openwork.recipes.task import Metric
from openwork.recipes.yaml_files import write_yaml
from openwork.utils.signals import Interrupted, interruptions

_ALSO = ("sad_start", "flip_rate", "density", "seconds")  # of each run, beside its scores


def planned_runs(config: CompareConfig) -> list[Config]:
    """Every run of a comparison. Dense comes once per seed, also where only ASP needs it; ASP starts from it, and all
    others from --init. With `equal_budget` ASP is half as long, and starts from a run of `half_runs`."""
    names = {field.name for field in fields(config.run)} - {"method_options"}
    shared = {name: value for name, value in asdict(config).items() if name in names}
    choices = _choices(config)
    threads = max(1, (config.threads or _cores()) // jobs_of(config, len(choices)))
    runs = []
    for choice in choices:
        trained = starts_trained(choice["method"])
        halved = trained and config.equal_budget
        start = {**choice, "method": DENSE, "pattern": config.patterns[0], "method_options": {}}
        init = _folder(config, start, halved) if trained else config.init
        place = {"threads": threads, "progress": False, "init": init, "out": _folder(config, choice, halved)}
        runs.append(config.run(**{**shared, **choice, **place, **(_half_of(config) if halved else {})}))
    return runs


def half_runs(config: CompareConfig, runs: Sequence[Config]) -> list[Config]:
    """The dense runs of half the length that those of equal budget start from. They are no rows of the table."""
    starts = {run.init: run for run in runs if config.equal_budget and starts_trained(run.method)}
    dense: dict[str, Any] = {"method": DENSE, "pattern": config.patterns[0], "method_options": {}, "init": config.init}
    return [replace(run, **dense, out=folder) for folder, run in starts.items()]


def _half_of(config: CompareConfig) -> dict[str, Any]:
    """The length and schedule of a run of half the length."""
    milestones = config.milestones and [at / 2 for at in config.milestones]
    return {"epochs": config.epochs // 2, "warmup": config.warmup / 2, "milestones": milestones}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_of(config: CompareConfig, runs: int) -> int:
    """Runs at a time: as asked, else one per core, since small networks gain little from a second thread."""
    if config.jobs:
        return config.jobs
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    return 1 if on_gpu else max(1, min(runs, _cores()))


def _choices(config: CompareConfig) -> list[dict[str, Any]]:
    """Method, pattern, options and seed of each run, in the order of the registry; a comparison cut short has whole
    seeds."""
    needs_dense = not config.equal_budget and any(map(starts_trained, config.methods))
    found = [best_options(Path(folder)) for folder in config.options_from]
    best = {key: options for each in found for key, options in each.items()}
    methods = [name for name in METHODS if name in config.methods or (name == DENSE and needs_dense)]
    choices = []
    for seed, method in product(config.seeds, methods):
        patterns = config.patterns if is_sparse(method) else config.patterns[:1]
        given = {name: values for name, values in config.method_options.items() if name in names_of(method)}
        values = {name: [value] for name, value in defaults_of(method).items()} | given
        for pattern, *options in product(patterns, *values.values()):
            named = dict(zip(values, options, strict=True))
            if config.options_from and (named or (method, pattern) in best):
                named = _found(best, method, pattern, config.options_from)
            choices.append({"method": method, "pattern": pattern, "method_options": named, "seed": seed})
    return choices


def best_options(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The options with the best score in a finished comparison, by method and pattern."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"--options_from {folder}: there is no {path.name}; let it finish there")
    found = json.loads(path.read_text(encoding="utf-8"))
    metric = Metric(**found["metrics"][0])
    told = [row for row in found["rows"] if row["scores"][metric.key] is not None]
    told.sort(key=lambda row: row["scores"][metric.key], reverse=not metric.higher_is_better)  # the best is the last
    return {(row["method"], row["pattern"]): row["options"] for row in told}


def _found(best: Mapping[tuple[str, str], dict[str, Any]], method: str, pattern: str, places: Any) -> dict[str, Any]:
    if (options := best.get((method, pattern))) is None:
        there = ", ".join(" ".join(key) for key in best)
        where = f"--options_from {' '.join(places)}"
        raise ValueError(f"{where}: no {method} {pattern} has a score there; there are {there}")
    return options


def _folder(config: CompareConfig, choice: dict[str, Any], halved: bool = False) -> str:
    """Where a run goes; a dense one of half the length one level below, where the report does not look for rows."""
    method, options = choice["method"], choice["method_options"]
    parts = [method, choice["pattern"].replace(":", "of")] if is_sparse(method) else [method]
    said = {name: name if value is True else value for name, value in options.items() if value is not False}
    parts += [f"{value:g}" if isinstance(value, float) else str(value).replace(":", "-") for value in said.values()]
    place = Path(config.out)
    if halved and is_sparse(method):
        parts.append("half")
    elif halved:
        place /= "half"
    return str(place / "-".join([*parts, f"seed{choice['seed']}"]))


def compare(config: CompareConfig, say: Callable[[str], None]) -> list[SummaryRow]:
    """Trains what is not there yet, writes results.json and report.html, returns the table's rows."""
    runs = planned_runs(config)
    every = [*half_runs(config, runs), *runs]
    for run in every:
        check_reusable(run)
    with interruptions(), locked(Path(config.out)):
        start = time.perf_counter()
        try:
            train_all(every, jobs_of(config, len(runs)), say)
        except Interrupted as stop:
            raise Interrupted(stop.signum, f"{stop}; its runs too: the same command goes on with them") from None
        results = [_result(run) for run in runs]
        rows = summary_rows(results)
        document = _document(config, results, rows, time.perf_counter() - start)
        write_text(Path(config.out) / "results.json", to_json(document, indent=1))
        write_report(Path(config.out))
    return rows


def train_all(runs: Sequence[Config], jobs: int, say: Callable[[str], None]) -> None:
    """Every run, those that start from others last. Where this raises, no run goes on in the background."""
    later = [run for run in runs if starts_trained(run.method)]
    workers, done = Workers(), itertools.count(1)

    def tell(line: str) -> None:
        say(f"{next(done):{len(str(len(runs)))}} of {len(runs)}  {line}")

    for stage in ([run for run in runs if run not in later], later):
        pool = ThreadPoolExecutor(jobs)
        try:
            list(pool.map(lambda run: run_one(run, tell, workers), stage))
        except BaseException:
            workers.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class Workers:
    """The processes that run, so that they can be stopped: by SIGTERM, upon which each keeps a checkpoint and ends."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, command: Sequence[str], **how: Any) -> int:
        """The exit status of a process that is started, unless all have been stopped before."""
        with self._lock:
            if self._stopped:
                return -1
            process = subprocess.Popen(command, **how)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def _document(
    config: CompareConfig, results: Sequence[dict[str, Any]], rows: Sequence[SummaryRow], seconds: float
) -> dict[str, Any]:
    keys = [metric.key for metric in metrics_of(results)]
    runs = []
    for r in results:
        chosen = {key: r["config"][key] for key in ("method", "pattern", "seed")}
        runs.append({**chosen, **options_of(r["config"]), **{key: r[key] for key in (*keys, *_ALSO)}})
    return {
        "config": values_of(config),
        **{key: results[0][key] for key in ("environment", "metrics", "notes")},
        "rows": [asdict(row) for row in rows],
        "runs": runs,
        "seconds_of_this_call": seconds,
    }


def _result(run: Config) -> dict[str, Any]:
    result = RunDir(Path(run.out)).read_result()
    if result is None:
        raise RuntimeError(f"{run.out} has no result; run `openwork compare` again to finish it")
    return result


def check_reusable(run: Config) -> None:
    """A run directory may only be there from the same configuration."""
    directory = RunDir(Path(run.out))
    if directory.config.exists() and (changed := differences(directory.read_config(), run)):
        raise ValueError(
            f"{run.out} holds a run with another configuration ({'; '.join(changed)}); choose another --out"
        )


def run_one(run: Config, say: Callable[[str], None], workers: Workers) -> None:
    """One run in a fresh process, continued if it was begun, skipped if it is finished."""
    directory = RunDir(Path(run.out))
    name = Path(run.out).name
    if (result := directory.read_result()) is not None:
        say(f"{name}: {headline(result)} (finished before)")
        return
    run = replace(run, resume=directory.config.exists())
    path = directory.path / "worker.yaml"
    write_yaml(path, values_of(run))
    start = time.perf_counter()
    command = [sys.executable, "-m", "openwork.cli", "train", run.task, "--config", str(path), "--quiet"]
    # Waiting threads that spin slow down the other jobs on the same cores.
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with (directory.path / "log.txt").open("a", encoding="utf-8") as log:
        code = workers.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if code:
        tail = (directory.path / "log.txt").read_text(encoding="utf-8", errors="replace")[-1500:]
        raise RuntimeError(f"run {name} ended with exit code {code}; the end of {directory.path / 'log.txt'}:\n{tail}")
    say(f"{name}: {headline(_result(run))} ({time.perf_counter() - start:.0f} s)")
