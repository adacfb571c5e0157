"""From the results of runs to the rows of one table: means, spreads, differences to dense."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openwork.recipes.config import DECAYED, REFRESHED
from openwork.recipes.task import Metric


@dataclass(frozen=True)
class Row:
    """One method at one pattern and decay, over its seeds. Shares in [0, 1], times in seconds.

    `scores` are the means of the metrics by key, the compared one first; of that one, `std` is the sample standard
    deviation (None with one seed), `delta` the mean difference to the dense runs of the same seeds, `p` the p-value
    of its paired t-test (three seeds or more). `seconds` is the mean training time, `budget` counts trainings.
    """

    method: str
    pattern: str
    decay: float | None
    seeds: list[int]
    scores: dict[str, float]
    std: float | None
    delta: float | None
    p: float | None
    sad_start: float | None
    churn: float | None
    density: float
    macs: int | None
    seconds_per_step: float | None
    seconds: float | None
    steps: int
    epochs: int
    budget: int


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Groups results by method, pattern and decay; order as given, dense first."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for result in results:
        c = result["config"]
        groups.setdefault((c["method"], c["pattern"], c["decay"] if c["method"] in DECAYED else 0.0), []).append(result)
    key = metrics_of(results)[0].key
    dense = {r["config"]["seed"]: r[key] for r in results if r["config"]["method"] == "dense"}
    return [_row(group, dense) for group in groups.values()]


def _row(group: Sequence[dict[str, Any]], dense: dict[int, float]) -> Row:
    c = group[0]["config"]
    metrics = metrics_of(group)
    compared = [r[metrics[0].key] for r in group]
    seeds = [r["config"]["seed"] for r in group]
    paired = c["method"] != "dense" and all(seed in dense for seed in seeds)
    deltas = [a - dense[seed] for a, seed in zip(compared, seeds, strict=True)] if paired else []
    return Row(
        method=c["method"],
        pattern="-" if c["method"] == "dense" else c["pattern"],
        decay=c["decay"] if c["method"] in DECAYED else None,
        seeds=seeds,
        scores={metric.key: statistics.fmean(r[metric.key] for r in group) for metric in metrics},
        std=statistics.stdev(compared) if len(compared) > 1 else None,
        delta=statistics.fmean(deltas) if deltas else None,
        p=paired_p(deltas),
        sad_start=_mean(group, "sad_start"),
        churn=_mean(group, "churn"),
        density=statistics.fmean(r["density"] for r in group),
        macs=group[0]["macs"],
        seconds_per_step=_median(group, "seconds_per_step"),
        seconds=_mean(group, "seconds"),
        steps=group[0]["steps"],
        epochs=c["epochs"],
        budget=2 if c["method"] == "asp" else 1,
    )


def metrics_of(results: Sequence[dict[str, Any]]) -> list[Metric]:
    """The metrics of the task that made these results, the compared one first."""
    return [Metric(**each) for each in results[0]["metrics"]]


def headline(result: dict[str, Any]) -> str:
    """The compared metric of one run, in words."""
    metric = metrics_of([result])[0]
    return metric.full_text(result[metric.key])


def _mean(group: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in group if r[key] is not None]
    return statistics.fmean(values) if values else None


def _median(group: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in group if r[key] is not None]
    return statistics.median(values) if values else None


def paired_p(deltas: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test that the mean difference is zero; None for fewer than three pairs."""
    if len(deltas) < 3 or len(set(deltas)) == 1:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(deltas, 0.0).pvalue)


def label_of(config: dict[str, Any]) -> str:
    """What tells a run's method apart: "dense", "ste 2:4", "sr-ste 2:4 0.0002"."""
    parts = [config["method"]] if config["method"] == "dense" else [config["method"], config["pattern"]]
    return " ".join([*parts, f"{config['decay']:g}"] if config["method"] in DECAYED else parts)


def header(metrics: Sequence[Metric]) -> list[str]:
    first, *others = metrics
    return [
        "method",
        "pattern",
        "decay",
        first.heading,
        "to dense",
        "p",
        *[metric.heading for metric in others],
        "SAD %",
        "churn %/step",
        "density",
        "MACs",
        "ms/step",
        "time s",
        "steps",
        "epochs",
    ]


def cells(row: Row, metrics: Sequence[Metric]) -> list[str]:
    """A row as text, for the terminal and the page."""
    first, *others = metrics
    many = len(row.seeds)
    spread = f"± {first.text(row.std)} ({many} seeds)" if row.std is not None else "(1 seed)"
    return [
        row.method,
        row.pattern,
        _text(row.decay, "g"),
        f"{first.text(row.scores[first.key])} {spread}",
        first.text(row.delta, "+"),
        _text(row.p, ".3f"),
        *[metric.text(row.scores[metric.key]) for metric in others],
        _text(row.sad_start, ".1f", 100),
        _text(row.churn, ".3f", 100),
        f"{row.density:.3f}",
        _macs(row.macs),
        _text(row.seconds_per_step, ".1f", 1000),
        _text(row.seconds, ".0f"),
        _times(row.budget, row.steps),
        _times(row.budget, row.epochs),
    ]


def _times(budget: int, count: int) -> str:
    return f"{count}" if budget == 1 else f"{budget} x {count}"


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)


def _macs(count: int | None) -> str:
    """
    >>> _macs(1_510_000_000)
    '1.51 G'
    """
    if count is None:
        return "-"
    return f"{count / 1e9:.3g} G" if count >= 999.5e6 else f"{count / 1e6:.3g} M"


def churns(records: Sequence[Mapping[str, Any]], method: str) -> list[float]:
    """The share of weights that changes in one step, at each record of a topology.jsonl: as counted in the recorded
    step, or, where masks stay for some steps and then change at once, the mean over the steps since the last record."""
    if method not in REFRESHED:
        return [record["sad_step"] / record["weights"] for record in records]
    steps = [0, *(record["step"] for record in records)]
    return [
        record["sad_last"] / record["weights"] / (record["step"] - before)
        for record, before in zip(records, steps, strict=False)
    ]


def notes(metrics: Sequence[Metric]) -> list[str]:
    first = metrics[0]
    better = "higher" if first.higher_is_better else "lower"
    return [
        f"{first.label}: of the finalized network on the validation samples ({better} is better);",
        "±: sample standard deviation over the seeds; to dense: mean difference to the dense runs of the same seeds;",
        "p: paired t-test of that difference, with 3 seeds or more;",
        "SAD: share of the sparse layers' weights whose membership at the end differs from the start;",
        "churn: the share that changes in one step, mean over the recorded steps; dense: of the mask it would have;",
        "of masks that stay for some steps (transposable): the change from record to record, over the steps between;",
        "time: of all training steps, without validation;",
        "ASP starts from the dense run of its seed, so its budget is two trainings.",
    ]


def plain_table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """The table as aligned text."""
    lines = [header(metrics), *[cells(row, metrics) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
