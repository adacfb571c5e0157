"""The command `openwork evaluate`: the scores of a trained network on data of your choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openwork.recipes import TASKS, find
from openwork.utils.counted import counted

_USAGE = f"""\
usage: openwork evaluate RUN [--data DATA] [any other flag of its task] [--json]
       openwork evaluate TASK FILE [--data DATA --model MODEL ...] [--json]

Score a trained network, in eval mode, on the validation samples of any data: RUN is the directory of a run, and flags
stand in place of those that it was trained with (--data, --validation, --hold_out, --limit_val, --threads, ...).
FILE is a .safetensors file, or for the task language a Hugging Face folder, which is its own --model.
TASK is one of: {", ".join(TASKS)}.
"""


def evaluate(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    as_json, words = "--json" in words, [word for word in words if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if words else 2
    task, config, source = _asked(words)
    found, count = _scores(task, config, source)
    if as_json:
        print(json.dumps(found))
        return 0
    data = config.data.partition("=")[0]
    for metric in task.metrics:
        print(metric.full_text(found[metric.key]))
    print(f"{source}: {counted(count, 'validation sample')} of {data}")
    return 0


def _asked(words: Sequence[str]) -> tuple[Any, Any, Path]:
    """The task, its configuration, and where the weights are."""
    from openwork.recipes.parser import parse
    from openwork.recipes.rundir import RunDir
    from openwork.recipes.trained import read_run

    first, *rest = words
    source = Path(first)
    if RunDir(source).config.exists():
        task, _ = read_run(source)  # whose errors name what is wrong with the folder
        flags = ["--config", str(RunDir(source).config), *rest]
    elif first in TASKS and rest and not rest[0].startswith("-"):
        task, source, flags = find(first), Path(rest[0]), rest[1:]
    else:
        raise ValueError(
            f"{first} is neither a run nor a task with a file: there is no {RunDir(source).config}; write "
            f"openwork evaluate RUN, or openwork evaluate {{{','.join(TASKS)}}} FILE"
        )
    config = parse(task.config, flags, f"openwork evaluate {first}", "Score a trained network.")
    return task, task.config_of(source, replace(config, out=str(source), teacher="")), source


def _scores(task: Any, config: Any, source: Path) -> tuple[dict[str, float], int]:
    """The metrics, and on how many samples."""
    import torch

    from openwork.recipes.rundir import RunDir
    from openwork.recipes.trained import build_trained, check_same_classes, scores

    if config.threads:
        torch.set_num_threads(config.threads)
    data = task.load_data(config)
    check_same_classes(source, RunDir(source).read_network(), task.network_facts(data))
    net = build_trained(task, config, data, source, "evaluate")
    return scores(task, config, net, data), data.val_count
