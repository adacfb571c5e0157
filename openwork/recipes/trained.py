"""Networks that are trained: read from a run directory or a file, scored, and as teachers.

A run directory may be reduced to config.yaml, model.safetensors and what the network takes from its data: network.json
(the classes), vocabulary.json. The data need not be there, but for scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from openwork.recipes import find
from openwork.recipes.config import Config
from openwork.recipes.data import Data
from openwork.recipes.rundir import RunDir
from openwork.recipes.task import DistillableTask, Task
from openwork.recipes.weights import load_weights
from openwork.utils.example import quiet


class Trained(NamedTuple):
    """A network in eval mode, one input for it, the configuration of its run, and what its task knows of the data:
    `info.tokenizer` in translation and language, `info.classes` where there are classes."""

    net: nn.Module
    example: Any
    config: Config
    info: Any


def load_run(folder: Path | str) -> Trained:
    """The finalized network of a finished run, whole or reduced, with one input for it.

    The input is a validation sample, and where the data is not there, one made here of the same form. FileNotFoundError
    names what is missing.
    """
    folder = Path(folder)
    task, config = read_run(folder)
    data = data_of(task, config, folder)
    return Trained(build_trained(task, config, data, folder), task.example(data), config, data.info)


def build_trained(task: Task, config: Config, data: Data, weights: Path, what: str = "--init") -> nn.Module:
    """The network of a configuration with the weights of a run or of a file, in eval mode; `what` named them."""
    net = task.architecture(config, data)
    load_weights(net, weights, what)
    return net.eval()


def data_of(task: Task, config: Config, folder: Path) -> Data:
    """The samples of a run; where they are not there, a sample made here for each part, in the same form."""
    try:
        return task.load_data(config)
    except FileNotFoundError:
        made = task.stand_in(config, RunDir(folder).read_network())
        if made is None:
            raise
        return made


def read_run(folder: Path) -> tuple[Task, Config]:
    """The task and the configuration that a run directory was started with, wherever it is now: what words a network
    knows lies there too."""
    values = RunDir(folder).read_config() | {"out": str(folder)}
    task = find(values["task"])
    return task, task.config.from_values(values)


def evaluate(folder: Path, net: nn.Module) -> dict[str, float]:
    """The metrics of a network on the validation samples of a run."""
    task, config = read_run(folder)
    return scores(task, config, net, task.load_data(config))


def scores(task: Task, config: Config, net: nn.Module, data: Data) -> dict[str, float]:
    """The metrics of a network on the validation samples of `data`."""
    task.before_last_validation(config, net)
    with quiet(net):
        batches = data.all_val_batches(task.eval_batch)
        predictions = [each for batch in batches for each in task.predictions(net, batch)]
    return task.compute_metrics(predictions, data)


def check_same_classes(folder: Path, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """ValueError where a network was trained on other classes than those of the data: `known` and `found` are what
    `Task.network_facts` tells of both."""
    for key in ("classes", "names"):
        ours, theirs = known.get(key), found.get(key)
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"{folder} was trained for the classes {_short(ours)}, and this data has {_short(theirs)}; give data "
                "with the same ones"
            )


def _short(classes: Any) -> str:
    if not isinstance(classes, list):
        return str(classes)
    return ", ".join(map(str, classes[:5])) + f", ... ({len(classes)})" * (len(classes) > 5)


def load_teacher(task: Task, config: Config, data: Data) -> nn.Module | None:
    """The network of --teacher, in eval mode and without gradients. torch's generator is left as it was."""
    if not config.teacher:
        return None
    if not isinstance(task, DistillableTask):
        raise ValueError(f"--teacher: the task {task.name} has no outputs that could be compared; leave it out")
    path = Path(config.teacher)
    other, built = read_run(path) if RunDir(path).config.exists() else (task, task.config_of(path, config))
    if other.name != task.name:
        raise ValueError(f"--teacher {path} is a run of the task {other.name}; needed one of {task.name}")
    with torch.random.fork_rng(devices=[]):
        return build_trained(task, built, data, path, "--teacher").requires_grad_(False)
