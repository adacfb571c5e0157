"""Write the tables of docs/results.md from the results.json files of `openwork compare`, one per task.

    openwork compare detection --data bccd=DIR ... --out runs/detection
    cp runs/detection/results.json benchmarks/results/detection.json
    python benchmarks/results_page.py

Each table goes between the lines `<!-- results TASK -->` and `<!-- end -->` of the page; the text around is typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from openwork.tasks import TASKS, find
from openwork.tasks.config import comparison
from openwork.tasks.summary import Row, cells, header, notes
from openwork.tasks.task import Metric

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results"
_TIMES = ("ms/step", "time s")
_NOT_SHOWN = ("out", "threads", "jobs", "progress", "workers", "log_every", "checkpoint_every")


def command(config: dict[str, Any]) -> str:
    """The command line that gives this configuration, with the folder of the data left out."""
    cls = comparison(find(config["task"]).config)
    default = cls()
    words = ["openwork", "compare", config["task"]]
    for field in fields(cls):
        value = config.get(field.name, getattr(default, field.name))  # older results lack newer flags
        if field.name in _NOT_SHOWN or value == getattr(default, field.name):
            continue
        name, _, folder = str(value).partition("=")
        text = f"{name}=DIR" if field.name == "data" and folder else _text(value)
        words.append(f"--{field.name}" if value is True else f"--{field.name} {text}")
    return " ".join(words)


def _text(value: Any) -> str:
    return (
        " ".join(map(_text, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def section(document: dict[str, Any]) -> str:
    """Command, machine, table and what its columns mean."""
    metrics = [Metric(**each) for each in document["metrics"]]
    rows = [cells(Row(**row), metrics) for row in document["rows"]]
    m = document["machine"]
    machine = f"{m['device']}, {m['cores']} cores, {m['threads']} thread(s) a run, torch {m['torch']}."
    machine += "".join(f" {key}: {value}." for key, value in document.get("notes", {}).items())
    lines = [f"```\n{command(document['config'])}\n```\n", f"{machine}\n", *markdown(header(metrics), rows)]
    explained = [note for note in notes(metrics) if not note.startswith("time:")]
    return "\n".join([*lines, "", " ".join(explained)])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table. Columns that hold nothing but "-" are left out, and times: runs shared the machine."""
    used = [i for i in range(len(head)) if head[i] not in _TIMES and any(row[i] != "-" for row in rows)]
    lines = [[line[i] for i in used] for line in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for task in TASKS:
        source = RESULTS / f"{task}.json"
        if not source.exists():
            continue
        text = section(json.loads(source.read_text(encoding="utf-8")))
        pattern = rf"(<!-- results {task} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S)
        if not count:
            raise SystemExit(f"{PAGE} lacks the lines <!-- results {task} --> and <!-- end -->")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
