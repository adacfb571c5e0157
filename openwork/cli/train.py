"""The command `openwork train`: one network with one method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openwork.recipes import TASKS, find
from openwork.utils.counted import counted


def train(words: list[str]) -> int:
    """Runs the command; returns the exit status."""
    task = task_of(words, "train")
    quiet = "--quiet" in words  # a worker of compare: no table of its own
    from openwork.recipes.parser import parse
    from openwork.recipes.recipe import train as run
    from openwork.recipes.rundir import first_process

    words = [word for word in words[1:] if word != "--quiet"]
    config = parse(task.config, words, f"openwork train {task.name}", "Train one network.")
    result = run(config)
    if not quiet and first_process():
        _show_result(result, Path(config.out))
    return 0


def _show_result(result: dict[str, Any], out: Path) -> None:
    from openwork.recipes.summary import headline

    print(result["summary"])
    if result["skipped"]:
        left_out = counted(result["skipped"], "sample could not be read and was", "samples could not be read and were")
        print(f"{left_out} left out")
    if diverged := result.get("diverged"):
        print(f"DIVERGED: not finite since step {diverged['step']} ({diverged['what']}); its scores mean nothing")
    print(f"{headline(result)} of the finalized network, density of its sparse layers {result['density'] or 0:.3f}")
    print(f"report: {(out / 'report.html').resolve()}")


def task_of(words: list[str], verb: str) -> Any:
    """The task that the first word names."""
    if words and words[0] in TASKS:
        return find(words[0])
    asked = f"there is no task {words[0]!r}" if words and not words[0].startswith("-") else "a task is missing"
    raise ValueError(f"{asked}; write openwork {verb} {{{','.join(TASKS)}}}")
