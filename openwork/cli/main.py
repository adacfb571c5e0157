"""The command `openwork`: train, compare, report, inspect, verify, export. Each imports what it needs when it runs."""

from __future__ import annotations

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
  openwork verify FILE              the same after reading all of it; fails if any weight is not as it says
  openwork verify MODEL.onnx        every product of an ONNX file, held to what the file promises, or to --pattern N:M
  openwork plan MODEL               time each layer dense and sparse on this machine; what ow.deploy would choose
  openwork bench                    time masks, products, whole models beside their dense baselines; writes CSV
  openwork export SOURCE --out OUT  a run or a file as ONNX, a program of torch.export, a folder for Hugging Face, ...

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
    commands = {
        "train": train,
        "compare": compare,
        "report": report,
        "inspect": inspect,
        "verify": verify,
        "export": export,
        "plan": plan,
        "bench": bench,
    }
    if name not in commands:
        raise ValueError(f"there is no command {name!r}; use one of {', '.join(commands)}, or --help")
    return commands[name]


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


def inspect(words: list[str]) -> int:
    from openwork.files.checkpoint import describe

    return _show_file(words, "inspect", "What a file of ow.save holds, from its header alone.", describe)


def export(words: list[str]) -> int:
    from openwork.cli.export import export as run

    print(run(words))
    return 0


def plan(words: list[str]) -> int:
    from openwork.bench.command import plan as run

    return run(words)


def bench(words: list[str]) -> int:
    from openwork.bench.command import bench as run

    return run(words)


def verify(words: list[str]) -> int:
    if any(word.endswith(".onnx") for word in words):
        return _verify_onnx(words)
    from openwork.files.checkpoint import check

    return _show_file(words, "verify", "Read all of a file of ow.save and check every group of every weight.", check)


def _show_file(words: list[str], verb: str, what: str, read: Callable[[str], Sequence[Any]]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        print(f"usage: openwork {verb} FILE\n\n{what}")
        return 0 if words and words[0] in ("-h", "--help") else 2
    from openwork.utils.table import aligned

    entries = read(words[0])
    header = ("tensor", "shape", "dtype", "pattern", "density", "bytes")
    print("\n".join(aligned(header, [_file_cells(each) for each in entries])))
    sparse = sum(each.pattern is not None for each in entries)
    print(f"{sparse} of {len(entries)} tensors compressed, {sum(each.bytes for each in entries):,} bytes of tensors")
    if verb == "verify":
        print("verified: every group holds what its pattern says")
    return 0


def _verify_onnx(words: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        "openwork verify", description="Check every product by a constant of an ONNX file."
    )
    parser.add_argument("file", metavar="MODEL.onnx")
    parser.add_argument("--pattern", help="N:M to hold them to; by default what the file itself promises")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="weights that --pattern leaves alone")
    asked = parser.parse_args(words)
    from openwork.cli.export import product_lines
    from openwork.export.products import check_onnx

    found = check_onnx(asked.file, asked.pattern, asked.exclude)
    print("\n".join(product_lines(found)))
    held = sum(each.promised for each in found)
    print(f"verified: {held} of {len(found)} products held to what was {'asked' if asked.pattern else 'promised'}")
    if 0 < held < len(found) and not asked.pattern:
        print("(found): not promised by the file (the exporter renames the weights of LSTM, GRU, RNN), only seen in it")
    if not held:
        print("the file promises nothing, so the patterns above are only what was found: give --pattern N:M")
    return 0


def _file_cells(entry: Any) -> tuple[str, ...]:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    pattern = f"= {entry.alias_of}" if entry.alias_of else str(entry.pattern or "dense")
    dtype = str(entry.dtype).removeprefix("torch.")
    return entry.name, shape, dtype, pattern, f"{entry.density:.3f}", f"{entry.bytes:,}"


if __name__ == "__main__":
    sys.exit(main())
