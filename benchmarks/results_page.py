"""Write the tables of docs/results.md from the results.json files of `openwork compare`, one per task.

    openwork compare detection --data bccd=DIR ... --out runs/detection
    cp runs/detection/results.json benchmarks/results/detection.json
    python benchmarks/results_page.py

Where a second comparison in the same --out adds rows (it finds the dense runs there), its results.json becomes
detection-1of4.json or the like, and one table holds both. Each table goes between the lines `<!-- results NAME -->` and
`<!-- end -->` of the page, NAME being a task, or one of `LONGER`, and what the columns mean between `<!-- legend -->`
and `<!-- end legend -->`; the text around is typed.
Folders of this machine are taken out of the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_tables import between

from openwork.recipes import TASKS, find
from openwork.recipes.config import comparison
from openwork.recipes.method_flags import option_flags
from openwork.recipes.summary import SummaryRow, notes, table_of
from openwork.recipes.task import Metric

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results"
LONGER = ("fashion-mnist", "twice-the-steps")  # classification, with more steps than under its own name
_TIMES = ("ms/step", "time s")
_NOT_SHOWN = ("out", "method_options", "threads", "jobs", "progress", "workers", "log_every", "checkpoint_every")


def command(config: dict[str, Any]) -> str:
    """The command line that gives this configuration, with the folder of the data left out."""
    default = asdict(comparison(find(config["task"]).config)())
    words = ["openwork", "compare", config["task"]]
    for name in (*default, *option_flags()):
        value = config.get(name, default.get(name))  # older results lack newer flags
        if name in _NOT_SHOWN or value == default.get(name):
            continue
        source, _, folder = str(value).partition("=")
        text = f"{source}=DIR" if name == "data" and folder else _text(value)
        words.append(f"--{name}" if value is True else f"--{name} {text}")
    return " ".join(words)


def _text(value: Any) -> str:
    return (
        " ".join(map(_text, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def section(documents: Sequence[dict[str, Any]]) -> str:
    """Commands, environment, table. The comparisons share task, machine and dense runs."""
    first = documents[0]
    metrics = [Metric(**each) for each in first["metrics"]]
    header, rows = table_of([SummaryRow(**row) for document in documents for row in document["rows"]], metrics)
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    e = first["environment"]
    environment = f"{e['device']}, {e['cores']} cores, {e['threads']} thread(s) a run, torch {e['torch']}."
    environment += "".join(f" {key}: {value}." for key, value in first.get("notes", {}).items())
    commands = "\n".join(command(document["config"]) for document in documents)
    lines = [f"```\n{commands}\n```\n", f"{environment}\n", *markdown(header, rows)]
    return "\n".join(lines)


def legend() -> str:
    """What the columns mean: as the report has it, for any task, without the times."""
    explained = [note for note in notes([Metric("score", "score")]) if not note.startswith("time:")]
    return " ".join(explained).replace(" (higher is better)", "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table. Columns that hold nothing but "-" are left out, and times: runs shared the machine."""
    used = [i for i in range(len(head)) if head[i] not in _TIMES and any(row[i] != "-" for row in rows)]
    lines = [[line[i] for i in used] for line in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def stored(name: str) -> list[dict[str, Any]]:
    """What is kept of the comparisons of one table, NAME.json first."""
    documents = []
    for path in (RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}-*.json"))):
        if not path.exists():
            continue
        documents.append(json.loads(path.read_text(encoding="utf-8")))
    return documents


def with_tables(page: str) -> str:
    """The page with every table as the stored results have it."""
    for name in (*TASKS, *LONGER):
        if not (documents := stored(name)):
            continue
        pattern = rf"(<!-- results {name} -->\n).*?(<!-- end -->)"
        text = section(documents)
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S)
        if not count:
            raise SystemExit(f"{PAGE} lacks the lines <!-- results {name} --> and <!-- end -->")
    return between(page, "<!-- legend -->\n", f"{legend()}\n", PAGE, "<!-- end legend -->")


def without_folders(document: dict[str, Any]) -> dict[str, Any]:
    """The same without the places of the data and of the runs on the machine that made it."""
    config = document["config"]
    name, has_folder, _ = config["data"].partition("=")
    found = {"data": f"{name}=DIR" if has_folder else name, "out": "runs"}
    if chosen := config.get("options_from"):
        found["options_from"] = [f"runs/{Path(folder).name}" for folder in chosen]
    return document | {"config": config | found}


def write_page() -> None:
    for path in RESULTS.glob("*.json"):
        document = without_folders(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_page()
