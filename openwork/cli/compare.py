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
    print("\n".join(_table(rows, task.metrics)))
    print(f"report, with every column: {(Path(config.out) / 'report.html').resolve()}")
    return 0


def _table(rows: Sequence[Any], metrics: Sequence[Any]) -> list[str]:
    """The table in 100 columns, and what its cells say."""
    from openwork.recipes.summary import fitted, table_of

    return [
        "",
        *fitted(*table_of(rows, metrics), 100),
        "",
        "±: standard deviation over the seeds; delta, p: difference to dense of the same seeds, t-test;",
        "SAD: share of the sparse weights that changed sides from start to end.",
        "",
    ]
