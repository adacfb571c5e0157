"""report.html: one self-contained page on a run or a comparison. No scripts, nothing loaded from elsewhere.

The files of a run may be a stranger's: they are checked, every text is escaped, and a content security policy in
the page forbids scripts, forms, and whatever is not in the page itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from openwork.recipes.charts import COLORS, MASK_KINDS, line_chart, mask_picture
from openwork.recipes.method_flags import (
    MASK_SCHEDULE,
    is_sparse,
    label_of,
    mask_steps,
    options_of,
    rank_of,
    starts_trained,
)
from openwork.recipes.pages import render
from openwork.recipes.rundir import RunDir, read_lines, write_text
from openwork.recipes.stored_result import read_finished, read_samples
from openwork.recipes.summary import flip_rates, meanings, metrics_of, notes, summary_rows, table_of
from openwork.recipes.task import Metric
from openwork.utils.counted import counted

Result = dict[str, Any]
Runs = Sequence[tuple[Path, Result]]
Records = list[dict[str, Any]]
Values = Callable[[Records, Result], list[float | None]]
_SCHEDULED = {"kept": "Share of weights that the schedule keeps", "mask_decay": "Mask decay beta"}
_LAYERS = ("weight", "shape", "pattern", "density", "magnitude at start", "weights", "MACs dense", "MACs sparse", "")


def write_report(path: Path) -> Path:
    """Builds `path`/report.html from the files of a run, or of the runs in its subdirectories."""
    paths = [path] if RunDir(path).result.exists() else [file.parent for file in path.glob("*/result.json")]
    if not paths:
        raise FileNotFoundError(f"{path} holds no finished run: there is no result.json in it or in its subdirectories")
    runs = [(run, read_finished(run)) for run in paths]
    if len(tasks := {(r["config"].get("task"), *(m["key"] for m in r["metrics"])) for _, r in runs}) > 1:
        raise ValueError(
            f"{path} holds runs of several tasks, {', '.join(sorted(str(t[0]) for t in tasks))}; move them"
        )
    try:
        runs.sort(key=lambda run: _rank(run[1]["config"]))
        page = build_page(runs)
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path}: the files of its runs are not what `openwork train` writes ({type(error).__name__}: {error}); "
            "they were changed, or another version wrote them: restore them, or train again"
        ) from error
    write_text(path / "report.html", page)
    return path / "report.html"


def _rank(config: dict[str, Any]) -> tuple[Any, ...]:
    n, m = map(int, config["pattern"].split(":"))
    options = options_of(config)
    schedule = options.pop(MASK_SCHEDULE, "")  # which not every run has
    return -n / m, m, rank_of(config["method"]), *options.values(), schedule, config["seed"]


def build_page(runs: Runs) -> str:
    """The document of finished runs, each with its directory."""
    results = [result for _, result in runs]
    config, environment = results[0]["config"], results[0]["environment"]
    metrics, shown = metrics_of(results), shown_run(results)
    header, lines = table_of(summary_rows(results), metrics)
    labels = list(dict.fromkeys(label_of(result["config"]) for result in results))
    return render(
        "report.html.j2",
        title=f"{config['model']} on {config['data'].partition('=')[0]}",
        subtitle=f"{counted(len(runs), 'run')} of {counted(config['epochs'], 'epoch')} on {environment['device']}",
        results=(header, [list(map(_unbroken, line)) for line in lines]),
        meanings=meanings(metrics),
        notes=" ".join(notes(metrics)),
        diverged=[f"{run.name}: {told['what']}" for run, result in runs if (told := result.get("diverged"))],
        legend_entries=[(label, COLORS[i % len(COLORS)]) for i, label in enumerate(labels)],
        charts=charts(runs, metrics, labels),
        samples=samples(runs),
        shown=label_of(shown["config"]),
        summary=shown["summary"],
        layers=(_LAYERS, [_layer(row) for row in shown["layers"]]),
        mask=shown["mask"]["layer"],
        group=shown["config"]["pattern"].split(":")[1],
        mask_legend=MASK_KINDS.items(),
        masks=mask_pictures(shown),
        facts=facts(results),
    )


def _unbroken(cell: str) -> str:
    """A cell with a parenthesis, which the page may break before that and nowhere else."""
    return cell.replace(" ", "\u00a0").replace("\u00a0(", " (") if "(" in cell else cell


def shown_run(results: Sequence[Result]) -> Result:
    """The run whose layers and mask are shown: of the last sparse method whose mask moves, else of the last method."""

    def rank(result: Result) -> tuple[bool, int]:
        method = result["config"]["method"]
        return is_sparse(method) and not starts_trained(method), rank_of(method)

    return max(results, key=rank)


def charts(runs: Runs, metrics: Sequence[Metric], labels: Sequence[str]) -> list[tuple[str, str]]:
    """Title and SVG of loss, metrics, SAD and flip rate over the steps: a line per run, a colour per method."""

    def chart(title: str, file: str, values: Values, **how: Any) -> tuple[str, str]:
        lines = []
        for run, result in runs:
            records = read_lines(run / file)
            try:
                values_of = values(records, result)
                points = [
                    (float(r["step"]), float(v)) for r, v in zip(records, values_of, strict=True) if v is not None
                ]
            except (KeyError, TypeError, ValueError, ArithmeticError) as error:
                raise ValueError(
                    f"{run / file}: a record is not what a run writes ({type(error).__name__}: {error}); "
                    "restore the file, or train again"
                ) from error
            lines.append((labels.index(label_of(result["config"])), points))
        return title, line_chart(title, lines, **how)

    def metric_chart(metric: Metric, **how: Any) -> tuple[str, str]:
        percent = metric.unit == "%"
        title = metric.label + (f", {metric.unit}" if metric.unit and not percent else "")
        scale = 1 if percent else metric.scale  # the chart makes percents of shares itself
        pick = partial(_each, lambda r: None if r.get(metric.key) is None else r[metric.key] * scale)
        return chart(title, "metrics.jsonl", pick, percent=percent, **how)

    loss = [Metric("train_loss", "Training loss")]
    loss += [Metric("val_loss", "Validation loss")] if "val_loss" in runs[0][1] else []  # not every task has one
    others = [replace(m, label=f"Validation {m.label}") for m in metrics if m.key != "val_loss"]
    sad = partial(_each, lambda r: r["sad_start"] / r["weights"])
    shares: dict[str, Any] = {"percent": True, "floor": 0}
    return [
        *[metric_chart(metric, floor=0) for metric in loss],
        *map(metric_chart, others),
        chart("SAD from the start, share of weights", "topology.jsonl", sad, **shares),
        chart("Flip rate, share of weights a step", "topology.jsonl", _flip_rates, **shares),
        *[
            chart(title, "metrics.jsonl", partial(_each, methodcaller("get", key)), **shares)
            for key, title in _SCHEDULED.items()
            if any(record.get(key) for run, _ in runs for record in read_lines(run / "metrics.jsonl"))
        ],
    ]


def _each(value: Callable[[dict[str, Any]], float | None], records: Records, _: Result) -> list[float | None]:
    return list(map(value, records))


def _flip_rates(records: Records, result: Result) -> list[float | None]:
    return [*flip_rates(records, mask_steps(result["config"]))]


def samples(runs: Runs) -> list[tuple[str, list[tuple[str, Any]]]]:
    """What networks say of a few validation samples beside what is right: one run per method, its first seed."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for run, result in runs:
        if parts := read_samples(run):
            shown.setdefault(label_of(result["config"]), parts)
    if len({len(parts) for parts in shown.values()}) > 1:
        counts = ", ".join(f"{label}: {len(parts)}" for label, parts in shown.items())
        raise ValueError(f"the runs do not show the same samples ({counts}); they are of other data: report each alone")
    return [
        (views[0]["name"], [("truth", views[0]["truth"]), *zip(shown, (v["predicted"] for v in views), strict=True)])
        for views in zip(*shown.values(), strict=True)
    ]


def _layer(row: dict[str, Any]) -> list[str]:
    counts = ["-" if row[key] is None else f"{row[key]:,}" for key in ("weights", "macs_dense", "macs_sparse")]
    shares = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("density", "retained")]
    return [row["name"], " x ".join(map(str, row["shape"])), row["pattern"] or "dense", *shares, *counts, row["reason"]]


def mask_pictures(result: Result) -> list[tuple[str, str]]:
    """Pictures of one layer's mask at the start and at the end, and of what changed."""
    start, end = (np.array([list(row) for row in result["mask"][when]]) == "1" for when in ("start", "end"))
    group = int(result["config"]["pattern"].split(":")[1])
    kind = list(MASK_KINDS).index
    changed = np.select([start & end, end, start], [kind("kept in both"), kind("gained"), kind("lost")], kind("pruned"))
    draw = partial(mask_picture, group=group)
    last = f"What changed: {(start != end).mean():.1%} of these weights"
    pictures = {"At the start": np.where(start, 0, 1), "At the end": np.where(end, 0, 1), last: changed}
    return [(title, draw(title, kinds)) for title, kinds in pictures.items()]


def facts(results: Sequence[Result]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The task's notes, environment, and every field of the configuration; several values where runs differ."""
    names = dict.fromkeys(name for result in results for name in result["config"])
    config = [
        (name, ", ".join(dict.fromkeys(str(r["config"][name]) for r in results if name in r["config"])))
        for name in names
    ]
    environment = [(name, str(value)) for name, value in results[0]["environment"].items()]
    told = [*results[0].get("notes", {}).items()]
    return [("scores", told)] * bool(told) + [("environment", environment), ("configuration", config)]
