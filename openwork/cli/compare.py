"""The command `openwork compare`: several methods from the same seeds, in one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openwork.cli.train import task_of


def compare(words: list[str]) -> int:
    """Runs the command; returns the exit status."""
    task = task_of(words, "compare")
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
