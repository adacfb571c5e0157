"""`openwork train TASK`: one network, one method, one run directory. What differs between tasks is in `Task`."""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import openwork as ow
from openwork.recipes import find
from openwork.recipes.config import Config, differences, values_of
from openwork.recipes.rundir import RunDir, first_process, read_lines, write_text
from openwork.recipes.sharding import gather, whole_twin
from openwork.recipes.summary import churns
from openwork.recipes.task import Task, build_method, described
from openwork.training.selection import Remainder

_PICTURE = 32, 96  # rows and columns of the mask picture


def load_weights(net: nn.Module, source: Path) -> None:
    """Dense weights from a run directory or a .safetensors file."""
    path = source / "model.safetensors" if source.is_dir() else source
    if not path.exists():
        raise FileNotFoundError(
            f"--init {source}: there is no {path}; give a finished run directory or a .safetensors file"
        )
    try:
        load_model(net, path)
    except RuntimeError as error:
        raise ValueError(
            f"--init {path} does not fit this model; train it with the same --model and --data ({error})"
        ) from error


def prepare(task: Task, config: Config) -> tuple[Any, nn.Module, ow.Report]:
    """Data, the network with its initial weights and masks, and the report on them: the same for the same config."""
    data = task.load_data(config)
    torch.manual_seed(config.seed)
    net = task.build(config, data)
    if config.init:
        load_weights(net, Path(config.init))
    example = task.example(data)
    remainder = cast(Remainder, config.remainder)
    report = ow.sparsify(
        net, config.pattern, build_method(config), exclude=config.exclude, remainder=remainder, example=example
    )
    return data, net, report


def finished(folder: Path) -> tuple[nn.Module, Any, Config]:
    """The network of a finished run with its weights, one validation input for it, and the run's configuration."""
    task, config = read_run(folder)
    data = task.load_data(config)
    net = task.build(config, data)
    load_weights(net, folder)
    return net.eval(), task.example(data), config


def read_run(folder: Path) -> tuple[Task, Config]:
    """The task and the configuration that a run directory was started with."""
    values = RunDir(folder).read_config()
    task = find(values.pop("task"))
    return task, task.config(**values)


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
        task.keep(data, run.path)
    picture = pictured_layer(report)
    start = mask_rows(net, picture)
    twin = whole_twin(config, net)
    module, trainer = fit(task, config, data, net, run, callbacks)
    net = module.net = gather(net, twin)
    end = mask_rows(net, picture)
    if build_method(config).sparse:  # dense training promises nothing
        ow.verify(net)
    ow.finalize(net)
    task.before_last_validation(config, net)
    trainer.validate(module, verbose=False)
    result = summary(config, report, net, run)
    result |= module.score | {"metrics": described(task.metrics), "steps": module.step, "skipped": data.skipped}
    result |= {"notes": task.notes(config, data), "mask": {"layer": picture, "start": start, "end": end}}
    if trainer.is_global_zero:
        save_model(net, str(run.model), metadata={"recipe": f"{config.pattern} {config.method}"})
        write_text(run.pictures, json.dumps([asdict(each) for each in task.pictures(config, net.eval(), data)]))
        run.write_result(result)
        write_page(run)
    run.close()
    return result


def fit(
    task: Task, config: Config, data: Any, net: nn.Module, run: RunDir, callbacks: Sequence[Any]
) -> tuple[Any, Any]:
    """Runs Lightning's loops from the start or from the last checkpoint."""
    from openwork.recipes.module import TaskModule, build_trainer

    hush()

    module = TaskModule(task, net, config, data, run)
    trainer = build_trainer(config, run.path, callbacks)
    checkpoint = str(run.checkpoint) if run.checkpoint.exists() else None
    if checkpoint is None and trainer.is_global_zero:
        run.rewind({})  # lines of a run that was killed before its first checkpoint
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    return module, trainer


def hush() -> None:
    """Only Lightning's warnings, and of those and torch's none that concern their own insides or torch's DataLoader."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*TF32 acceleration on top of oneDNN.*",
        ".*when logging on epoch level in distributed setting.*",  # each process has the score of all samples
    ):
        warnings.filterwarnings("ignore", message=message)


def write_page(run: RunDir) -> None:
    from openwork.recipes.report import write_report

    write_report(run.path)


def summary(config: Config, report: ow.Report, net: nn.Module, run: RunDir) -> dict[str, Any]:
    """Everything a table or page needs, in JSON's types."""
    topology = read_lines(run.path / "topology.jsonl")
    steps = [s for record in read_lines(run.path / "times.jsonl") for s in record["seconds"]]
    weights = dict(net.named_parameters())
    sparse = [weights[name] for name in report.sparse]
    return {
        "config": values_of(config),
        "density": sum(int(w.count_nonzero()) for w in sparse) / sum(w.numel() for w in sparse),
        "macs_dense": report.macs_dense,
        "macs": report.macs_dense if config.method == "dense" else report.macs_sparse,
        "sad_start": topology[-1]["sad_start"] / topology[-1]["weights"] if topology else None,
        "churn": statistics.fmean(churns(topology, config.method)) if topology else None,
        "seconds_per_step": statistics.median(steps) if steps else None,
        "seconds": sum(steps) if steps else None,
        "layers": [layer(row) for row in report.rows],
        "summary": report.summary,
        "machine": machine(),
    }


def layer(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "shape": list(row.shape),
        "pattern": str(row.pattern) if row.pattern else None,
        "reason": row.reason,
        "density": row.density,
        "kept_energy": row.retained,
        "weights": row.weights,
        "macs_dense": row.macs_dense,
        "macs_sparse": row.macs_sparse,
    }


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "openwork": getattr(ow, "__version__", ""),
    }
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def pictured_layer(report: ow.Report) -> str:
    """The sparse weight that fills the mask picture best; of several, the one in the middle."""
    filled = {
        row.name: min(row.shape[0], _PICTURE[0]) * min(row.weights // row.shape[0], _PICTURE[1])
        for row in report.rows
        if row.pattern
    }
    best = [name for name, squares in filled.items() if squares == max(filled.values())]
    return best[len(best) // 2]


def mask_rows(net: nn.Module, name: str) -> list[str]:
    """A corner of a layer's mask, one string of 0 and 1 per output; neighbours in a string share a group."""
    mask: Tensor = ow.masks(net)[name]
    rows = mask.movedim(1, -1).flatten(1)[: _PICTURE[0], : _PICTURE[1]]
    return ["".join("1" if kept else "0" for kept in row) for row in rows.tolist()]
