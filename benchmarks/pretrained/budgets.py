"""One pattern for all layers against a pattern a layer at the same cost, pruned at once and not repaired.

    B="python benchmarks/pretrained/budgets.py --packages DIR --data DATA"
    $B sentences            # the encoder of sentences.py: R@1 of 1,000 queries; writes build/budgets/sentences.json
    $B pitch                # the tracker of pitch.py: share within 50 cents of 1,024 frames
    $B sentences --of time  # the cost is what ow.plan measures on this machine for a batch of 32 sentences

DIR and DATA are those of the two scripts. The cost that is allowed is that of the uniform pattern.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import openwork as ow
from openwork.bench.measure import today
from openwork.pruning.allocate import Choice, choose
from openwork.utils.atomic import write_text
from openwork.utils.hardware import cpu_model

sys.path.insert(0, str(Path(__file__).parent))
import pitch_net
import sentence_data
import sentences

PATTERNS = ("3:4", "2:4", "1:4", "1:8", "1:16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="holds tatoeba-en-de, for sentences")
    parser.add_argument("--out", type=Path, default=Path("build/budgets"))
    parser.add_argument("network", choices=["sentences", "pitch"])
    parser.add_argument("--of", choices=["macs", "time"], default="macs")
    parser.add_argument("--uniform", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="calibration sets")
    asked = parser.parse_args()
    dense, batches_of, example, exclude, score = {"sentences": _sentences, "pitch": _pitch}[asked.network](asked)
    about = {"machine": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__, "date": today()}
    found: list[dict[str, Any]] = [{"pattern": "dense", **score(dense)}]
    print(found[0], flush=True)
    for seed in asked.seeds:
        for row in _compared(dense, batches_of(seed), example, exclude, asked):
            row |= {"seed": seed, **score(row.pop("model"))}
            print(row, flush=True)
            found.append(row)
            asked.out.mkdir(parents=True, exist_ok=True)
            written = {**about, "of": asked.of, "found": found}
            write_text(asked.out / f"{asked.network}-{asked.of}.json", json.dumps(written, indent=1) + "\n")


def _compared(dense: nn.Module, batches: list[Any], example: Any, exclude: list[str], asked: argparse.Namespace) -> Any:
    """The network pruned at each uniform pattern, and by an allocation that costs no more."""
    start = time.process_time()
    measured = ow.allocate(dense, batches, budget=1.0, of=asked.of, patterns=PATTERNS, exclude=exclude, example=example)
    measuring = time.process_time() - start
    for text in asked.uniform:
        uniform = ow.Pattern.parse(text)
        fixed = {name: _choice(every, uniform) for name, every in measured.choices.items()}
        share = sum(each.cost for each in fixed.values()) / sum(each[0].cost for each in measured.choices.values())
        chosen = choose(measured.choices, share)
        for kind, choices in (("uniform", fixed), ("allocated", chosen)):
            patterns = {name: choice.pattern for name, choice in choices.items() if choice.pattern}
            model = copy.deepcopy(dense)
            ow.prune(model, patterns, batches, solver=ow.SparseGPT())
            cost = sum(each.cost for each in choices.values())
            yield {
                "pattern": text,
                "kind": kind,
                "share": cost / sum(each[0].cost for each in measured.choices.values()),
                "layer_errors": sum(each.error for each in choices.values()),
                "patterns": {name: str(pattern) for name, pattern in patterns.items()},
                "measuring_cpu_seconds": measuring,
                "model": model,
            }


def _choice(every: list[Choice], pattern: ow.Pattern) -> Choice:
    return next(each for each in every if each.pattern == pattern)


Network = tuple[nn.Module, Callable[[int], list[Any]], Any, list[str], Callable[[nn.Module], Mapping[str, Any]]]


def _sentences(asked: argparse.Namespace) -> Network:
    corpus, model = sentence_data.read_corpus(asked.packages, asked.data), sentences.Encoder(asked.packages).eval()

    def batches(seed: int) -> list[Any]:
        return sentences.of_equal_length(sentences.tokens_of(asked, corpus.calibration(seed)))

    def score(model: nn.Module) -> dict[str, Any]:
        found = sentences.scores(model, asked, corpus)
        return {"r1": found["test"]["r1"], "lee": found["lee"]}

    example = sentences.padded(sentences.tokens_of(asked, corpus.calibration(0)[-32:]))
    return model, batches, example, sentences.DENSE, score


def _pitch(asked: argparse.Namespace) -> Network:
    model, tested = pitch_net.crepe(asked.packages), pitch_net.tones(1024, 7)

    def batches(seed: int) -> list[Any]:
        return list(pitch_net.tones(64, 1000 + seed)[0].split(32))

    def score(model: nn.Module) -> Mapping[str, Any]:
        return pitch_net.scores(pitch_net.errors(copy.deepcopy(model), *tested))

    return model, batches, pitch_net.tones(1, 7)[0], ["blocks.0"], score


if __name__ == "__main__":
    main()
