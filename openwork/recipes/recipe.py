"""`openwork train TASK`: one network, one method, one run directory. What differs between tasks is in `Task`."""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import openwork as ow
from openwork.recipes import find
from openwork.recipes.config import Config, differences, values_of
from openwork.recipes.data import Data
from openwork.recipes.method_flags import build_method, is_sparse, mask_steps
from openwork.recipes.module import TaskModule, build_trainer
from openwork.recipes.parallel import full_copy, gather
from openwork.recipes.report import write_report
from openwork.recipes.rundir import RunDir, first_process, read_lines, write_text
from openwork.recipes.summary import flip_rates
from openwork.recipes.task import Task, description_of
from openwork.recipes.weights import load_weights, save_weights
from openwork.training.selection import Remainder
from openwork.utils.hardware import cpu_name

_MASK = 32, 96  # rows and columns of the mask in the report


def prepare(task: Task, config: Config) -> tuple[Data, nn.Module, ow.Report]:
    """Data, the network with its initial weights and masks, and the report on them: the same for the same config."""
    data = task.load_data(config)
    torch.manual_seed(config.seed)
    net = task.build(config, data)
    if config.init:
        load_weights(net, Path(config.init))
    report = ow.sparsify(
        net,
        config.pattern,
        build_method(config.method, config.method_options),
        exclude=config.exclude,
        remainder=cast(Remainder, config.remainder),
        example=task.example(data),
    )
    return data, net, report


def load_run(folder: Path) -> tuple[nn.Module, Any, Config]:
    """The network of a finished run with its weights, one validation input for it, and the run's configuration."""
    task, config = read_run(folder)
    data = task.load_data(config)
    net = task.build(config, data)
    load_weights(net, folder)
    return net.eval(), task.example(data), config


def read_run(folder: Path) -> tuple[Task, Config]:
    """The task and the configuration that a run directory was started with."""
    values = RunDir(folder).read_config()
    task = find(values["task"])
    return task, task.config.from_values(values)


def open_run(config: Config) -> RunDir:
    """The run directory, new or to be resumed; refuses to mix two runs."""
    run = RunDir(Path(config.out))
    if not first_process():  # the first one has checked
        return run
    if not run.config.exists():
        run.write_config(values_of(config))
        return run
    if not config.resume:
        raise FileExistsError(f"{run.path} already holds a run; add --resume to continue it, or choose another --out")
    if changed := differences(run.read_config(), config):
        raise ValueError(
            f"{run.path} was started with another configuration ({'; '.join(changed)}); "
            "resume it with its own, or choose another --out"
        )
    return run


def train(config: Config, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains, verifies, finalizes and evaluates; returns the result that it also writes to the run directory."""
    if config.threads:
        torch.set_num_threads(config.threads)
    task = find(config.task)
    data, net, report = prepare(task, config)  # before the directory: bad input leaves nothing behind
    run = open_run(config)
    if (done := run.read_result()) is not None:
        return done
    if first_process():
        task.save_artifacts(data, run.path)
    layer = shown_layer(report)
    start = mask_rows(net, layer)
    full = full_copy(config, net)
    module, trainer = fit(task, config, data, net, run, callbacks)
    net = module.net = gather(net, full)
    mask = {"layer": layer, "start": start, "end": mask_rows(net, layer)}
    if is_sparse(config.method):
        ow.verify(net)
    ow.finalize(net)
    task.before_last_validation(config, net)
    trainer.validate(module, verbose=False)
    result = summary(config, report, net, run)
    result |= module.scores | {"metrics": description_of(task.metrics), "steps": module.step, "skipped": data.skipped}
    result |= {"notes": task.notes(config, data), "mask": mask}
    if trainer.is_global_zero:
        save_weights(net, run.model)
        samples = [asdict(sample) for sample in task.visualizations(config, net.eval(), data)]
        write_text(run.visualizations, json.dumps(samples))
        run.write_result(result)
        write_report(run.path)
    return result


def fit(
    task: Task, config: Config, data: Data, net: nn.Module, run: RunDir, callbacks: Sequence[Any]
) -> tuple[Any, Any]:
    """Runs Lightning's loops from the start or from the last checkpoint."""
    silence_lightning()
    module = TaskModule(task, net, config, data, run)
    trainer = build_trainer(config, run.path, callbacks)
    checkpoint = str(run.checkpoint) if run.checkpoint.exists() else None
    if checkpoint is None and trainer.is_global_zero:
        run.rewind({})  # lines of a run that was killed before its first checkpoint
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
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
    sparse = [weights[name] for name in report.sparse]
    return {
        "config": values,
        "density": sum(int(w.count_nonzero()) for w in sparse) / sum(w.numel() for w in sparse),
        "macs_dense": report.macs_dense,
        "macs": report.macs_sparse if is_sparse(config.method) else report.macs_dense,
        "sad_start": topology[-1]["sad_start"] / topology[-1]["weights"] if topology else None,
        "flip_rate": statistics.fmean(flip_rates(topology, mask_steps(values))) if topology else None,
        "seconds_per_step": statistics.median(steps) if steps else None,
        "seconds": sum(steps) if steps else None,
        "layers": [layer(row) for row in report.rows],
        "summary": report.summary,
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
