"""report.html: one self-contained page on a run or a comparison. No scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openwork.recipes.charts import Line, line_chart, mask_picture
from openwork.recipes.page import figure, grid, heading, legend, page, paragraph, table
from openwork.recipes.rundir import RunDir, read_lines, write_text
from openwork.recipes.summary import cells, churns, header, label_of, metrics_of, notes, rows_of
from openwork.recipes.task import Metric

_COLORS = 8  # in the style sheet
_METHODS = ("dense", "asp", "ste", "sr-ste", "transposable-sr-ste")

Result = dict[str, Any]


def write_report(path: Path) -> Path:
    """Builds `path`/report.html from the files of a run, or of the runs in its subdirectories."""
    paths = [path] if RunDir(path).result.exists() else [file.parent for file in path.glob("*/result.json")]
    if not paths:
        raise FileNotFoundError(f"{path} holds no finished run: there is no result.json in it or in its subdirectories")
    runs = [(run, RunDir(run).read_result() or {}) for run in paths]
    runs.sort(key=lambda run: _rank(run[1]["config"]))
    write_text(path / "report.html", build_page(runs))
    return path / "report.html"


def _rank(config: dict[str, Any]) -> tuple[Any, ...]:
    n, m = map(int, config["pattern"].split(":"))
    return -n / m, m, _METHODS.index(config["method"]), config["decay"], config["seed"]


def build_page(runs: Sequence[tuple[Path, Result]]) -> str:
    """The document of finished runs, each with its directory."""
    results = [result for _, result in runs]
    shown = pictured(results)
    config, machine = results[0]["config"], results[0]["machine"]
    data, metrics = config["data"].partition("=")[0], metrics_of(results)
    rows = [cells(row, metrics) for row in rows_of(results)]
    subtitle = f"{len(runs)} run{'s' * (len(runs) > 1)} of {config['epochs']} epochs on {machine['device']}"
    sections = [
        ("Results", table(header(metrics), rows) + paragraph(" ".join(notes(metrics)), "note")),
        ("Curves", curves(runs)),
        *pictures(runs),
        (f"Layers: {label_of(shown['config'])}", layers(shown)),
        (f"One mask: {shown['mask']['layer']}, {label_of(shown['config'])}", mask(shown)),
        ("How it was run", facts(results)),
    ]
    return page(f"{config['model']} on {data}", subtitle, sections)


def pictured(results: Sequence[Result]) -> Result:
    """The run whose layers and mask are shown: an SR-STE one, else one whose mask moves, else any."""
    rank = ("sr-ste", "transposable-sr-ste", "ste", "dense", "asp")
    return min(results, key=lambda result: rank.index(result["config"]["method"]))


def curves(runs: Sequence[tuple[Path, Result]]) -> str:
    """Loss, metrics, SAD and churn over the steps, a line per run, a colour per method."""
    labels = list(dict.fromkeys(label_of(result["config"]) for _, result in runs))
    color = {label: i % _COLORS for i, label in enumerate(labels)}

    def lines(file: str, value: Callable[[dict[str, Any]], float | None]) -> list[Line]:
        return every(file, lambda records, _: [value(record) for record in records])

    def every(file: str, values: Callable[[list[dict[str, Any]], str], list[Any]]) -> list[Line]:
        made = []
        for run, result in runs:
            config, records = result["config"], read_lines(run / file)
            label, found = label_of(config), values(records, config["method"])
            points = [(r["step"], v) for r, v in zip(records, found, strict=True) if v is not None]
            made.append(Line(f"{label}, seed {config['seed']}", color[label], points))
        return made

    metric = "metrics.jsonl"
    val_loss = lines(metric, lambda r: r.get("val_loss"))  # not every task has one
    figures = [
        line_chart("Training loss", lines(metric, lambda r: r.get("train_loss")), floor=0),
        *([line_chart("Validation loss", val_loss, floor=0)] if any(line.points for line in val_loss) else []),
        *[_metric_chart(each, lines) for each in metrics_of([result for _, result in runs]) if each.key != "val_loss"],
        line_chart(
            "SAD from the start, share of weights", lines("topology.jsonl", _share("sad_start")), percent=True, floor=0
        ),
        line_chart("Churn in one step, share of weights", every("topology.jsonl", churns), percent=True, floor=0),
    ]
    return legend((f"c{color[label]}", label) for label in labels) + grid("charts", figures)


def _metric_chart(metric: Metric, lines: Callable[..., list[Line]]) -> str:
    percent = metric.unit == "%"
    title = f"Validation {metric.label}" + ("" if percent or not metric.unit else f", {metric.unit}")
    scale = 1 if percent else metric.scale  # the chart makes percents of shares itself

    def value(record: dict[str, Any]) -> float | None:
        return record[metric.key] * scale if metric.key in record else None

    return line_chart(title, lines("metrics.jsonl", value), percent=percent)


def pictures(runs: Sequence[tuple[Path, Result]]) -> list[tuple[str, str]]:
    """What networks say of a few validation samples beside what is right: one run per method, its first seed."""
    shown: dict[str, list[dict[str, str]]] = {}
    for run, result in runs:
        if found := RunDir(run).read_pictures():
            shown.setdefault(label_of(result["config"]), found)
    if not shown:
        return []
    samples = zip(*shown.values(), strict=True)
    return [("Samples", "".join(_sample(list(shown), sample) for sample in samples))]


def _sample(labels: Sequence[str], views: Sequence[dict[str, str]]) -> str:
    figures = [("as it is", views[0]["truth"])] + [
        (label, view["predicted"]) for label, view in zip(labels, views, strict=True)
    ]
    return heading(views[0]["name"]) + grid("samples", [figure(caption, html) for caption, html in figures])


def _share(key: str) -> Callable[[dict[str, Any]], float]:
    return lambda record: record[key] / record["weights"]


_LAYERS = ("weight", "shape", "pattern", "density", "kept energy at start", "weights", "MACs dense", "MACs sparse", "")


def layers(result: Result) -> str:
    """What became sparse and what did not, and why."""
    return paragraph(result["summary"]) + table(_LAYERS, [_layer(row) for row in result["layers"]])


def _layer(row: dict[str, Any]) -> list[str]:
    counts = ["-" if row[key] is None else f"{row[key]:,}" for key in ("weights", "macs_dense", "macs_sparse")]
    shares = [f"{row[key]:.3f}" for key in ("density", "kept_energy")]
    return [row["name"], " x ".join(map(str, row["shape"])), row["pattern"] or "dense", *shares, *counts, row["reason"]]


_KINDS = (("k", "kept"), ("p", "pruned"), ("s", "kept in both"), ("g", "only at the end"), ("l", "only at the start"))
_CHANGE = {"11": "s", "00": "p", "01": "g", "10": "l"}


def mask(result: Result) -> str:
    """Pictures of one layer's mask at the start and at the end, and of what changed."""
    start, end = result["mask"]["start"], result["mask"]["end"]
    group = int(result["config"]["pattern"].split(":")[1])
    changed = ["".join(_CHANGE[a + b] for a, b in zip(*rows, strict=True)) for rows in zip(start, end, strict=True)]
    moved = sum(row.count("g") + row.count("l") for row in changed) / max(1, sum(map(len, changed)))
    intro = f"A corner of the layer. Rows are outputs, columns weights along the reduction axis in groups of {group}."
    figures = [
        mask_picture("At the start", _kept(start), group),
        mask_picture("At the end", _kept(end), group),
        mask_picture(f"What changed: {moved:.1%} of these weights", changed, group),
    ]
    return paragraph(intro) + legend(_KINDS) + grid("masks", figures)


def _kept(rows: Sequence[str]) -> list[str]:
    return [row.replace("1", "k").replace("0", "p") for row in rows]


def facts(results: Sequence[Result]) -> str:
    """The task's notes, machine, versions and every field of the configuration; several values where runs differ."""
    config = [[key, ", ".join(dict.fromkeys(str(r["config"][key]) for r in results))] for key in results[0]["config"]]
    machine = [[key, str(value)] for key, value in results[0]["machine"].items()]
    notes = [[key, value] for key, value in results[0].get("notes", {}).items()]
    tables = [(("scores", ""), notes)] * bool(notes) + [(("machine", ""), machine), (("configuration", ""), config)]
    return grid("facts", [table(head, rows) for head, rows in tables])
