"""From the results of runs to the rows of one table: means, spreads, differences to dense."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openwork.recipes.method_flags import DENSE, budget_of, label_of, option_texts, options_of
from openwork.recipes.task import Metric
from openwork.utils.table import aligned


@dataclass(frozen=True)
class SummaryRow:
    """One method at one pattern and with one choice of its options, over its seeds. Shares in [0, 1], times in seconds.

    `scores` are the means of the metrics by key, the compared one first; of that one, `std` is the sample standard
    deviation (None with one seed), `delta` the mean difference to the dense runs of the same seeds, `p` the p-value
    of its paired t-test (three seeds or more). `seconds` is the mean training time, `budget` counts trainings.
    """

    method: str
    pattern: str
    options: dict[str, Any]
    seeds: list[int]
    scores: dict[str, float | None]
    std: float | None
    delta: float | None
    p: float | None
    sad_start: float | None
    flip_rate: float | None
    density: float | None
    macs: int | None
    seconds_per_step: float | None
    seconds: float | None
    steps: int
    epochs: int
    budget: int


def summary_rows(results: Sequence[dict[str, Any]]) -> list[SummaryRow]:
    """Groups results by method, pattern, options and length; order as given."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((label_of(result["config"]), result["config"]["epochs"]), []).append(result)
    key = metrics_of(results)[0].key
    dense = {r["config"]["seed"]: r[key] for r in results if r["config"]["method"] == DENSE}
    return [_row(group, dense) for group in groups.values()]


def _row(group: Sequence[dict[str, Any]], dense: dict[int, float | None]) -> SummaryRow:
    c = group[0]["config"]
    is_dense = c["method"] == DENSE
    metrics = metrics_of(group)
    compared = [r[metrics[0].key] for r in group]
    seeds = [r["config"]["seed"] for r in group]
    told = [score for score in compared if score is not None]  # None: of a run that diverged
    paired = not is_dense and all(dense.get(seed) is not None for seed in seeds) and told == compared
    deltas = [a - dense[seed] for a, seed in zip(compared, seeds, strict=True)] if paired else []
    return SummaryRow(
        method=c["method"],
        pattern="-" if is_dense else c["pattern"],
        options=options_of(c),
        seeds=seeds,
        scores={metric.key: _average(group, metric.key) for metric in metrics},
        std=statistics.stdev(told) if len(told) > 1 else None,
        delta=statistics.fmean(deltas) if deltas else None,
        p=paired_p(deltas),
        sad_start=_average(group, "sad_start"),
        flip_rate=_average(group, "flip_rate"),
        density=_average(group, "density"),
        macs=group[0]["macs"],
        seconds_per_step=_average(group, "seconds_per_step", statistics.median),
        seconds=_average(group, "seconds"),
        steps=group[0]["steps"],
        epochs=c["epochs"],
        budget=budget_of(c["method"]),
    )


def _average(group: Sequence[dict[str, Any]], key: str, average: Any = statistics.fmean) -> float | None:
    values = [r[key] for r in group if r[key] is not None]
    return average(values) if values else None


def metrics_of(results: Sequence[dict[str, Any]]) -> list[Metric]:
    """The metrics of the task that made these results, the compared one first."""
    return [Metric(**metric) for metric in results[0]["metrics"]]


def headline(result: dict[str, Any]) -> str:
    """The compared metric of one run, in words."""
    metric = metrics_of([result])[0]
    return metric.full_text(result[metric.key])


def paired_p(deltas: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test that the mean difference is zero; None for fewer than three pairs."""
    if len(deltas) < 3 or len(set(deltas)) == 1:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(deltas, 0.0).pvalue)


def table_of(rows: Sequence[SummaryRow], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """Header and cells as text, for the terminal and the page."""
    lines = [_cells(row, metrics) for row in rows]
    return list(lines[0]), [list(line.values()) for line in lines]


def _cells(row: SummaryRow, metrics: Sequence[Metric]) -> dict[str, str]:
    first, *others = metrics
    seeds = len(row.seeds)
    spread = f"± {first.text(row.std)} ({seeds} seeds)" if row.std is not None else "(1 seed)"
    times = "" if row.budget == 1 else f"{row.budget} x "
    return {
        "method": row.method,
        "pattern": row.pattern,
        "options": " ".join(option_texts(row.options)) or "-",
        first.heading: f"{first.text(row.scores[first.key])} {spread}",
        "delta vs dense": first.text(row.delta, "+"),
        "p": _text(row.p, ".3f"),
        **{metric.heading: metric.text(row.scores[metric.key]) for metric in others},
        "SAD %": _text(row.sad_start, ".1f", 100),
        "flip rate %/step": _text(row.flip_rate, ".3f", 100),
        "density": _text(row.density, ".3f"),
        "MACs": _macs(row.macs),
        "ms/step": _text(row.seconds_per_step, ".1f", 1000),
        "time s": _text(row.seconds, ".0f"),
        "steps": f"{times}{row.steps}",
        "epochs": f"{times}{row.epochs}",
    }


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


def flip_rates(records: Sequence[Mapping[str, Any]], mask_steps: int) -> list[float]:
    """The share of weights that changes in one step, at each record of a topology.jsonl: as counted in the recorded
    step, or, where masks stay for `mask_steps` and change at once, the mean over the steps since the last record."""
    if not mask_steps:
        return [record["sad_step"] / record["weights"] for record in records]
    steps = [0, *(record["step"] for record in records)]
    return [
        record["sad_last"] / record["weights"] / (record["step"] - before)
        for record, before in zip(records, steps, strict=False)
    ]


def meanings(metrics: Sequence[Metric]) -> dict[str, str]:
    """What the columns of the table mean, by heading."""
    first = metrics[0]
    better = "higher" if first.higher_is_better else "lower"
    return {
        first.heading: f"of the finalized network on the validation samples ({better} is better)",
        "delta vs dense": "mean difference to the dense runs of the seeds",
        "p": "paired t-test of that difference, with 3 seeds or more",
        "SAD %": "share of the sparse layers' weights whose membership at the end differs from the start",
        "flip rate %/step": "the share that changes in one step, mean of the recorded steps; "
        "dense: of the mask it would have",
        "time s": "of all training steps, without validation",
        "epochs": "ASP starts from a dense run of its seed, so its budget is two trainings of the epochs that stand "
        "there",
    }


def notes(metrics: Sequence[Metric]) -> list[str]:
    """The same as lines of text, with what the cells say."""
    told = meanings(metrics)
    return [
        f"{metrics[0].label}: {told[metrics[0].heading]};",
        f"±: sample standard deviation over the seeds; delta vs dense: {told['delta vs dense']};",
        f"p: {told['p']};",
        f"SAD: {told['SAD %']};",
        f"flip rate: {told['flip rate %/step']};",
        "of masks that stay for some steps (transposable): the change from record to record, over the steps between;",
        f"time: {told['time s']};",
        f"{told['epochs']}.",
    ]


_LEAST = ("steps", "density", "ms/step", "time s")  # left out first, in this order, then further scores, then these
_LESS = ("flip rate %/step", "epochs", "p", "MACs", "options")


def fitted(header: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[str]:
    """The table as lines of text, without the columns that are too many for a width, the least important first.

    >>> fitted(["method", "steps", "SAD %"], [["dense", "330", "26.6"]], 15)
    ['method  SAD %', 'dense   26.6']
    """
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    others = [name for name in header[6:] if name not in (*_LEAST, *_LESS, "SAD %")]
    for name in ("", *_LEAST, *reversed(others), *_LESS):
        columns.pop(name, None)
        text = aligned(list(columns), [*zip(*columns.values(), strict=True)])
        if max(map(len, text)) <= width:
            break
    return text
