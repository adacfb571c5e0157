"""The command `openwork`: train, compare, report, inspect, verify, export. Each imports what it needs when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openwork.recipes import TASKS, find

USAGE = f"""\
openwork: train N:M sparse networks from scratch

  openwork train TASK               one network with one method; --help shows every flag and its default
  openwork compare TASK             dense, ASP, STE and SR-STE from the same seeds: one table, one report.html
  openwork report RUN               rebuild report.html of a run or a comparison
  openwork inspect FILE             what a compressed file holds, from its header alone
  openwork verify SOURCE            the same after reading all of it; or which N:M the weights of any other checkpoint
                                    keep, and along which axis; or every GEMM of an ONNX file; --pattern N:M holds to it
  openwork plan SOURCE              time each layer dense and sparse on this hardware; what ow.deploy would choose
  openwork bench [SOURCE ...]       time masks, GEMMs, whole models beside their dense baselines; writes CSV
  openwork export SOURCE --out OUT  as ONNX, a program of torch.export, a folder for Hugging Face, ...

SOURCE is module:factory, a run directory, a Hugging Face folder, a compressed file, or a model of torchvision by name.
TASK is one of: {", ".join(TASKS)}.
Without --data each trains on something small that needs no download.
Flags may stand in a YAML file: --config FILE; flags after it override it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status. Errors of the user come as one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    try:
        return _command(words[0])(words[1:])
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"openwork: {_explain(error)}", file=sys.stderr)
        return 2


def _command(name: str) -> Callable[[list[str]], int]:
    own = {"train": train, "compare": compare, "report": report}
    others = ("inspect", "verify", "export", "plan", "bench")  # each a function in a module of its name
    if name in own:
        return own[name]
    if name not in others:
        raise ValueError(f"there is no command {name!r}; use one of {', '.join((*own, *others))}, or --help")
    return getattr(importlib.import_module(f"openwork.cli.{name}"), name)


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("openwork"):
        extra = "export" if (error.name or "").startswith("onnx") else "train"
        return f"{error.name} is not installed; this needs the extra: pip install 'openwork[{extra}]'"
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:  # torch wraps the traceback of the process around it
        return text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return text


def _task(words: list[str], verb: str) -> Any:
    """The task that the first word names."""
    if words and words[0] in TASKS:
        return find(words[0])
    asked = f"there is no task {words[0]!r}" if words and not words[0].startswith("-") else "a task is missing"
    raise ValueError(f"{asked}; write openwork {verb} {{{','.join(TASKS)}}}")


def train(words: list[str]) -> int:
    task = _task(words, "train")
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
        print(f"{result['skipped']} samples could not be read and were left out")
    print(f"{headline(result)} of the finalized network, density of its sparse layers {result['density']:.3f}")
    print(f"report: {(out / 'report.html').resolve()}")


def compare(words: list[str]) -> int:
    task = _task(words, "compare")
    from openwork.recipes.compare import compare as run
    from openwork.recipes.config import comparison
    from openwork.recipes.parser import parse

    about = "Train several methods from the same seeds. --json prints results.json instead of the table."
    as_json = "--json" in words  # results.json on stdout instead of the table
    words = [word for word in words[1:] if word != "--json"]
    config = parse(comparison(task.config), words, f"openwork compare {task.name}", about)
    rows = run(config, lambda line: print(line, flush=True, file=sys.stderr if as_json else sys.stdout))
    if as_json:
        print((Path(config.out) / "results.json").read_text(encoding="utf-8"))
        return 0
    _show_table(rows, task.metrics)
    print(f"report: {(Path(config.out) / 'report.html').resolve()}")
    return 0


def _show_table(rows: Sequence[Any], metrics: Sequence[Any]) -> None:
    from openwork.recipes.summary import notes, table_of
    from openwork.utils.table import aligned

    header, lines = table_of(rows, metrics)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(aligned(header, lines)))
    else:
        table = Table(*header)
        for line in lines:
            table.add_row(*line)
        console = Console()
        wide = console.width if console.is_terminal else 180
        Console(width=wide).print(table)
    print("\n".join(notes(metrics)))


def report(words: list[str]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: openwork report RUN\n\nRebuild report.html of a run directory or of a comparison's directory.")
        return 0 if words and words[0] in ("-h", "--help") else 2
    from openwork.recipes.report import write_report

    print(f"report: {write_report(Path(words[0])).resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
