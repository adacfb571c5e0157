"""`openwork train TASK`: one network, one method, one run directory. What differs between tasks is in `Task`."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import statistics
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import openwork as ow
from openwork.recipes import find
from openwork.recipes.config import Config, differences, values_of
from openwork.recipes.data import Data
from openwork.recipes.divergence import Diverged
from openwork.recipes.json_files import finite
from openwork.recipes.lock import locked
from openwork.recipes.mask_schedules import check_length
from openwork.recipes.method_flags import build_method, ends_sparse, mask_steps
from openwork.recipes.module import TaskModule, build_trainer
from openwork.recipes.report import write_report
from openwork.recipes.rundir import RunDir, first_process, read_lines
from openwork.recipes.summary import flip_rates
from openwork.recipes.task import Task, description_of
from openwork.recipes.trained import load_teacher
from openwork.recipes.weights import load_weights, save_weights
from openwork.training.selection import Remainder
from openwork.utils.hardware import cpu_name
from openwork.utils.signals import Interrupted, Interruption, interruptions

_MASK = 32, 96  # rows and columns of the mask in the report


def prepare(task: Task, config: Config) -> tuple[Data, nn.Module, ow.Report]:
    """Data, the network with its initial weights and masks, and the report on them: the same for the same config."""
    data = task.load_data(config)
    method = build_method(config.method, config.method_options)
    check_length(method.schedule, config.epochs * (data.train_count // config.batch_size))
    torch.manual_seed(config.seed)
    net = task.build(config, data)
    if config.init:
        load_weights(net, Path(config.init))
    if config.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    report = ow.sparsify(
        net,
        config.pattern,
        method,
        exclude=config.exclude,
        remainder=cast(Remainder, config.remainder),
        example=task.example(data),
    )
    return data, net, report


def open_run(config: Config) -> RunDir:
    """The run directory, new or to be resumed; refuses to mix two runs."""
    run = RunDir(Path(config.out))
    if not first_process():  # the first one has checked
        return run
    if not run.config.exists():
        if left := [path.name for path in (run.result, run.checkpoints.last, run.model) if path.exists()]:
            raise FileNotFoundError(
                f"{run.path} has {', '.join(left)} of a run, but no {run.config.name}; restore it, or choose another "
                "--out"
            )
        run.write_config(values_of(config))
        return run
    if not config.resume:
        raise FileExistsError(f"{run.path} already holds a run; add --resume to continue it, or choose another --out")
    if changed := differences(run.read_config(), config):
        raise ValueError(
            f"{run.path} was started with another configuration ({'; '.join(changed)}); "
            "resume it with its own, or choose another --out"
        )
    if (record := run.read_diverged()) is not None and not config.allow_nan:
        raise Diverged(record["step"], diverged_text(config, run, record["what"]))
    return run


def train(config: Config, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains, verifies, finalizes and evaluates; returns the result that it also writes to the run directory.

    SIGINT, SIGTERM and SIGHUP raise `Interrupted`, before the next step and with a checkpoint of it; `Diverged` says
    where numbers stopped being finite. Either way nothing is written that looks like a result.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    task, run = find(config.task), RunDir(Path(config.out))
    with interruptions() as interruption:
        try:
            prepared = prepare(task, config)  # before the directory: bad input leaves nothing behind
            teacher = load_teacher(task, config, prepared[0])
            with locked(run.path) if first_process() else nullcontext():
                open_run(config)
                if (done := finished(run)) is not None:
                    return done
                return train_in(run, task, config, prepared, interruption, callbacks, teacher)
        except Interrupted as stop:
            raise Interrupted(stop.signum, f"{stop}; {how_to_go_on(config, run)}") from None


def train_in(
    run: RunDir,
    task: Task,
    config: Config,
    prepared: tuple[Data, nn.Module, ow.Report],
    interruption: Interruption,
    callbacks: Sequence[Any],
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """`train` in its own run directory, from the start or from the last checkpoint."""
    data, net, report = prepared
    if first_process():
        task.save_artifacts(data, run.path)
        run.write_network(task.network_facts(data))
    layer = shown_layer(report)
    start = mask_rows(net, layer)
    try:
        module, trainer = fit(task, config, data, net, run, callbacks, interruption, teacher)
        net = module.net = module.whole()
        mask = {"layer": layer, "start": start, "end": mask_rows(net, layer)}
        if ends_sparse(values_of(config)):
            ow.verify(net)
        ow.finalize(net)
        task.before_last_validation(config, net)
        trainer.validate(module, verbose=False)
    except Diverged as error:
        run.write_diverged({"step": error.step, "what": str(error)})
        raise Diverged(error.step, diverged_text(config, run, str(error))) from error
    result = summary(config, report, net, run)
    result |= module.scores | {"metrics": description_of(task.metrics), "steps": module.step, "skipped": data.skipped}
    result |= {"notes": task.notes(config, data), "mask": mask, "diverged": module.diverged}
    if trainer.is_global_zero:
        save_weights(net, run.model)
        run.write_visualizations([asdict(sample) for sample in task.visualizations(config, net.eval(), data)])
        run.write_result(result)
        write_report(run.path)
    return finite(result)


def finished(run: RunDir) -> dict[str, Any] | None:
    """The result of a run that has one, with what else belongs to it."""
    result = run.read_result()
    if result is None:
        return None
    if not run.model.exists():
        raise FileNotFoundError(
            f"{run.path} has a {run.result.name}, but no {run.model.name}; remove {run.result.name}, and --resume goes "
            "on from the last checkpoint"
        )
    if first_process() and not run.report.exists():  # killed while it was made
        write_report(run.path)
    return result


def how_to_go_on(config: Config, run: RunDir) -> str:
    """What an interrupted run has kept, and the command that continues it."""
    if not run.config.exists():
        return "nothing is written yet: the same command starts it again"
    try:
        newest = run.checkpoints.newest()
    except (ValueError, OSError) as error:
        return str(error)
    place = "the beginning: there is no checkpoint yet" if newest is None else f"its checkpoint of step {newest[1]}"
    file = shlex.quote(str(run.config))
    return f"`openwork train {config.task} --config {file} --resume` goes on from {place}"


def diverged_text(config: Config, run: RunDir, what: str) -> str:
    return (
        f"{run.path} stopped: {what}. Resumed, it would end there again: train it with a smaller --lr, --clip, or "
        f"another --precision in another --out; or add --resume --allow_nan to go on regardless"
    )


def fit(
    task: Task,
    config: Config,
    data: Data,
    net: nn.Module,
    run: RunDir,
    callbacks: Sequence[Any],
    interruption: Interruption | None = None,
    teacher: nn.Module | None = None,
) -> tuple[Any, Any]:
    """Runs Lightning's loops from the start or from the last checkpoint; returns the module and the trainer."""
    silence_lightning()
    interruption = interruption or Interruption()
    module = TaskModule(task, net, config, data, run, interruption, teacher)
    trainer = build_trainer(config, run.path, callbacks)
    newest = run.checkpoints.newest()
    if newest is None and trainer.is_global_zero:
        run.rewind({})  # lines of a run that was killed before its first checkpoint
    try:
        with interruption.deferred():
            trainer.fit(module, ckpt_path=None if newest is None else str(newest[0]), weights_only=True)
    except Interrupted as stop:
        total = config.epochs * module.steps_per_epoch
        raise Interrupted(stop.signum, f"{stop} at step {module.step} of {total}") from None
    return module, trainer


def silence_lightning() -> None:
    """Only Lightning's warnings, and of those and torch's none that concern their own insides or torch's DataLoader."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",  # --workers is the user's choice
        ".*TF32 acceleration on top of oneDNN.*",
        ".*when logging on epoch level in distributed setting.*",  # each process has the metrics of all samples
    ):
        warnings.filterwarnings("ignore", message=message)


def summary(config: Config, report: ow.Report, net: nn.Module, run: RunDir) -> dict[str, Any]:
    """Everything a table or page needs, in JSON's types."""
    values = values_of(config)
    topology = read_lines(run.path / "topology.jsonl")
    steps = [s for record in read_lines(run.path / "times.jsonl") for s in record["seconds"]]
    weights = dict(net.named_parameters())
    sparse = [weights[row.name] for row in report.rows if row.pattern]
    return {
        "config": values,
        "density": sum(int(w.count_nonzero()) for w in sparse) / sum(w.numel() for w in sparse),
        "macs_dense": report.macs_dense,
        "macs": report.macs_sparse if ends_sparse(values) else report.macs_dense,
        "sad_start": topology[-1]["sad_start"] / topology[-1]["weights"] if topology else None,
        "flip_rate": statistics.fmean(flip_rates(topology, mask_steps(values))) if topology else None,
        "seconds_per_step": statistics.median(steps) if steps else None,
        "seconds": sum(steps) if steps else None,
        "layers": [layer(row) for row in report.rows],
        "summary": report.summary if ends_sparse(values) else f"dense; {config.pattern} would be: {report.summary}",
        "environment": run_environment(),
    }


def layer(row: Any) -> dict[str, Any]:
    names = ("name", "reason", "density", "retained", "weights", "macs_dense", "macs_sparse")
    pattern = str(row.pattern) if row.pattern else None
    return {"shape": list(row.shape), "pattern": pattern, **{name: getattr(row, name) for name in names}}


def run_environment() -> Mapping[str, Any]:
    """What the numbers depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "openwork": ow.__version__}
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def shown_layer(report: ow.Report) -> str:
    """The sparse weight that fills the picture of a mask best; of several, the one in the middle."""
    filled = {
        row.name: min(row.shape[0], _MASK[0]) * min(row.weights // row.shape[0], _MASK[1])
        for row in report.rows
        if row.pattern
    }
    best = [name for name, squares in filled.items() if squares == max(filled.values())]
    return best[len(best) // 2]


def mask_rows(net: nn.Module, name: str) -> list[str]:
    """A corner of a layer's mask, one string of 0 and 1 per output; neighbours in a string share a group."""
    mask: Tensor = ow.masks(net)[name]
    rows = mask.movedim(1, -1).flatten(1)[: _MASK[0], : _MASK[1]]
    return ["".join("1" if kept else "0" for kept in row) for row in rows.tolist()]
