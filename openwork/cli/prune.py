"""The command `openwork prune`: a trained network made N:M at once, from calibration data."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

import openwork as ow
from openwork.cli.calibrate import FORMS, batches, perplexity
from openwork.cli.source import FORMS as FORMS_OF_SOURCE
from openwork.cli.source import Source, add_arguments, open_model
from openwork.export.huggingface import to_huggingface
from openwork.pruning import SOLVERS
from openwork.pruning.allocate import Of
from openwork.pruning.report import PruneReport
from openwork.training.selection import Selection
from openwork.utils.atomic import write_text

_ABOUT = f"""\
Prune a trained network once, layer by layer, so that each layer's outputs on calibration data change as little as
possible. Writes a folder: the compressed file, dense weights with zeros and what else belongs to the model, prune.json
and report.html. A stopped command goes on where it was when it is given again with --resume.

{FORMS}
{FORMS_OF_SOURCE}"""


def prune(words: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    asked = _parser().parse_args(words)
    out = Path(asked.out)
    if (out / "prune.json").exists():
        raise FileExistsError(f"{out} holds a pruned network already; choose another --out")
    if out.exists() and any(out.iterdir()) and not asked.resume:
        raise FileExistsError(f"{out} is not empty; choose another --out, or add --resume to go on with a stopped run")
    source = open_model(asked.source, model=asked.model, shapes=asked.input, needs_input=False)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    given = batches(
        source, asked.calibrate, samples=asked.samples, tokens=asked.tokens, batch=asked.batch, seed=asked.seed
    )
    selection = Selection(_pattern(source, given, asked), exclude=asked.exclude)
    before = score(source, asked.validate, asked.tokens)
    dense = copy.deepcopy(source.model) if asked.beside else nn.Module()
    solver = SOLVERS[asked.solver]()
    found = ow.prune(source.model, selection, given, solver=solver, resume=out / "layers")
    after = score(source, asked.validate, asked.tokens)
    beside = {name: ow.prune(copy.deepcopy(dense), selection, given, solver=SOLVERS[name]()) for name in asked.beside}
    _write(out, source, selection, asked, found, {"before": before, "after": after}, beside)
    shutil.rmtree(out / "layers")
    print(found)
    for name, value in before.items():
        print(f"{name}: {value:.4g} before, {after[name]:.4g} after")
    print(f"report: {(out / 'report.html').resolve()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "openwork prune", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    add_arguments(parser)
    add("--pattern", metavar="N:M", help="of all weights (default: 2:4)")
    add("--budget", type=float, metavar="SHARE", help="instead: a pattern for each layer, at this share of the cost")
    add("--of", choices=get_args(Of), default="time", help="what --budget is a share of (time, measured here)")
    add("--exclude", nargs="+", default=(), metavar="GLOB", help="weights that stay dense")
    add("--solver", choices=SOLVERS, default="alps", help="how weights are chosen and made up for (alps)")
    add("--beside", nargs="+", choices=SOLVERS, default=(), help="solvers to compare with in the report")
    data = parser.add_argument_group("data").add_argument
    data("--calibrate", nargs="+", default=(), metavar="FILE")
    data("--samples", type=_positive, default=128, help="windows, images or samples to calibrate with (128)")
    data("--tokens", type=_positive, default=512, help="of a window of text (512)")
    data("--batch", type=_positive, default=8, help="samples of a batch (8)")
    data("--seed", type=int, default=0, help="which samples are drawn (0)")
    data("--validate", nargs="+", default=(), metavar="TEXT", help="held-out text, for the perplexity before and after")
    add("--resume", action="store_true", help="go on with a stopped command, which left the layers it had in DIR")
    add("--threads", type=_positive, help="of torch (default: its own)")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _pattern(source: Source, given: list[Any], asked: argparse.Namespace) -> Any:
    if asked.budget is None:
        return asked.pattern or "2:4"
    if asked.pattern:
        raise ValueError("--pattern and --budget: give one of them")
    found = ow.allocate(source.model, given, budget=asked.budget, of=asked.of, exclude=asked.exclude)
    print(found)
    return found


def score(source: Source, validate: Sequence[str], tokens: int) -> dict[str, float]:
    """What the network is worth: the metrics of its run's task, and the perplexity on --validate."""
    found: dict[str, float] = {}
    if source.run:
        from openwork.recipes.trained import evaluate

        found |= evaluate(Path(source.run), source.model)
    if validate:
        found["perplexity"] = perplexity(source, [Path(name) for name in validate], tokens)
    return found


def _write(
    out: Path,
    source: Source,
    selection: Selection,
    asked: argparse.Namespace,
    found: PruneReport,
    scores: Mapping[str, Mapping[str, float]],
    beside: Mapping[str, PruneReport],
) -> None:
    to_huggingface(source.model, out, pattern=selection, method=f"pruned at once by {found.solver}")
    source.save_beside(out)
    reports = {asked.solver: found, **beside}
    arguments = {name: value for name, value in vars(asked).items() if value not in (None, (), "")}
    values = {
        "source": source.name,
        "arguments": arguments,
        "scores": scores,
        "solvers": {name: [asdict(layer) for layer in report.layers] for name, report in reports.items()},
        "seconds": {name: report.seconds for name, report in reports.items()},
    }
    from openwork.recipes.prune_page import page

    write_text(out / "report.html", page(source.name, reports, scores, arguments))
    write_text(out / "prune.json", json.dumps(values, indent=1, default=str))
