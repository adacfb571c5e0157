"""Write the tables and figures of docs/results.md, and README's table, from stored results of `openwork compare`.

    python benchmarks/protocol.py detection --data bccd=DIR        # keeps its results in benchmarks/results
    python benchmarks/results_page.py

The results of a task are TASK-STAGE.json; one table holds all of them, with the figure docs/results-TASK.svg, between
the lines `<!-- results TASK -->` and `<!-- end -->` of the page. TASK-compare.json also gives the task's line of the
first table, between `<!-- five tasks -->` and `<!-- end five tasks -->` of page and README. What the columns mean goes
between `<!-- legend -->` and `<!-- end legend -->`; the text around is typed. Folders of this machine are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_tables import between
from results_figure import plot

from openwork.recipes import TASKS, find
from openwork.recipes.config import comparison
from openwork.recipes.method_flags import option_flags, option_texts
from openwork.recipes.summary import SummaryRow, notes, table_of
from openwork.recipes.task import Metric

ROOT = Path(__file__).parent.parent
PAGE, RESULTS, README = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results", ROOT / "README.md"
FOUR = {"dense": "dense", "ste": "STE", "sr-ste": "SR-STE", "asp": "ASP, equal budget"}
EARLIER = {  # comparisons of before the protocol: two longer ones of classification, and short ones
    "fashion-mnist": ("fashion-mnist.json", "fashion-mnist-transposable.json"),
    "twice-the-steps": ("twice-the-steps.json",),
    **{task: (f"{task}.json", f"{task}-1of4.json") for task in ("segmentation", "flow")},
}
ANCHORS = {"segmentation": "instance-segmentation", "flow": "optical-flow"}  # of sections not named as their task
_SIGNIFICANT = 0.05  # of a paired t-test
_TIMES = ("ms/step", "time s")
CHOOSING = ("choose", "choose-more", "knobs-decay", "knobs-steps", "knobs-ramp")  # by held-out samples
SAME_LENGTH = ("compare", "trained-twice", "patterns", "methods", "methods-ramp")
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


def section(documents: Sequence[dict[str, Any]], choosing: Sequence[dict[str, Any]] = ()) -> str:
    """Commands, environment, what was chosen, table. The comparisons share task, machine and dense runs."""
    first = documents[0]
    metrics = [Metric(**each) for each in first["metrics"]]
    header, rows = table_of([SummaryRow(**row) for document in documents for row in document["rows"]], metrics)
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    e = first["environment"]
    environment = f"{e['device']}, {e['cores']} cores, {e['threads']} thread(s) a run, torch {e['torch']}."
    environment += "".join(f" {key}: {value}." for key, value in first.get("notes", {}).items())
    commands = "\n".join(command(document["config"]) for document in (*choosing, *documents))
    chosen = [f"- {line}" for document in choosing for line in tried(document)]
    chosen = ["Tried on samples that are not those of the table:", "", *chosen, ""] if chosen else []
    return "\n".join([f"```\n{commands}\n```\n", f"{environment}\n", *chosen, *markdown(header, rows)])


def tried(document: dict[str, Any]) -> list[str]:
    """The scores by which options were chosen, a line for each method and pattern."""
    metric = Metric(**document["metrics"][0])
    found: dict[str, list[str]] = {}
    for row in (SummaryRow(**each) for each in document["rows"]):
        options = " ".join(option_texts(row.options)) or "no option"
        found.setdefault(f"{row.method} {row.pattern}", []).append(f"{options}: {metric.text(row.scores[metric.key])}")
    return [f"{metric.heading} of {name}: {', '.join(scores)}" for name, scores in found.items()]


def legend() -> str:
    """What the columns mean: as the report has it, for any task, without the times."""
    explained = [note for note in notes([Metric("score", "score")]) if not note.startswith("time:")]
    return " ".join(explained).replace(" (higher is better)", "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table. Columns that hold nothing but "-" are left out, and times: runs shared the machine."""
    used = [i for i in range(len(head)) if head[i] not in _TIMES and any(row[i] != "-" for row in rows)]
    lines = [[line[i] for i in used] for line in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def overview(comparisons: Sequence[dict[str, Any]]) -> str:
    """One line a task: the compared score of each of `FOUR` at 2:4, mean ± deviation over the seeds and, in brackets,
    the difference to dense; bold where its paired t-test has p < 0.05."""
    rows = []
    for document in comparisons:
        metric = Metric(**document["metrics"][0])
        by_method = {row.method: row for row in (SummaryRow(**each) for each in document["rows"])}
        label = metric.heading if metric.higher_is_better else f"{metric.heading} (lower is better)"
        cells = [_overview_cell(by_method[method], metric) for method in FOUR]
        task = document["config"]["task"]
        rows.append([f"[{task}](results.md#{ANCHORS.get(task, task)})", label, *cells])
    return "\n".join(markdown(["task", "score", *FOUR.values()], rows))


def _overview_cell(row: SummaryRow, metric: Metric) -> str:
    score = f"{metric.text(row.scores[metric.key])} ± {metric.text(row.std)}"
    if row.delta is None:
        return score
    difference = f"({metric.text(row.delta, '+')})"
    return f"{score} **{difference}**" if row.p is not None and row.p < _SIGNIFICANT else f"{score} {difference}"


def stored(task: str, stages: Sequence[str]) -> list[dict[str, Any]]:
    """What is kept of the comparisons of a task."""
    return read([f"{task}-{stage}.json" for stage in stages])


def read(names: Sequence[str]) -> list[dict[str, Any]]:
    """Those results that are there."""
    return [json.loads((RESULTS / n).read_text(encoding="utf-8")) for n in names if (RESULTS / n).exists()]


def with_overview(page: str, path: Path) -> str:
    """The page with the table of all tasks; `path` is its file."""
    text = overview([document for task in TASKS for document in stored(task, ["compare"])])
    text = text.replace("(results.md#", "(docs/results.md#") if path == README else text.replace("(results.md#", "(#")
    return between(page, "<!-- five tasks -->\n", f"\n{text}\n\n", path, "<!-- end five tasks -->")


def with_tables(page: str) -> str:
    """The page with every table as the stored results have it."""
    for task in TASKS:
        if not (documents := stored(task, (*SAME_LENGTH, "twice"))):
            continue
        text = section(documents, stored(task, CHOOSING))
        picture = f"![Scores of {task}](results-{task}.svg)"
        page = between(page, f"<!-- results {task} -->\n", f"\n{text}\n\n{picture}\n\n", PAGE, "<!-- end -->")
    for name, files in EARLIER.items():
        if not (documents := read(files)):
            continue  # replaced by results of the protocol
        page = between(page, f"<!-- results {name} -->\n", f"\n{section(documents)}\n\n", PAGE, "<!-- end -->")
    page = with_overview(page, PAGE)
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
    README.write_text(with_overview(README.read_text(encoding="utf-8"), README), encoding="utf-8")
    for task in TASKS:
        if same := stored(task, SAME_LENGTH):
            plot(
                same,
                stored(task, ["twice"]),
                stored(task, ["choose", "choose-more"]),
                PAGE.with_name(f"results-{task}.svg"),
            )


if __name__ == "__main__":
    write_page()
