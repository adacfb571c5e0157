"""The comparisons of docs/results.md: every method, task by task, on equal terms.

    python benchmarks/protocol.py classification --data fashion-mnist=DIR            # all stages, in order
    python benchmarks/protocol.py detection choose compare --data bccd=DIR           # some of them
    python benchmarks/mask_changes.py classification-methods.json ...                # score against SAD and flip rate

Each stage is one or several `openwork compare`, printed. They take hours of one core; started again, they go on where
they were stopped. What is found is copied to benchmarks/results, and the tables of the page are made from it.

    choose         the decay of SR-STE, by samples that are not the reported ones, on a seed that no other stage has
    compare        dense, ASP in an equal budget, STE and SR-STE with its best decay, at 2:4
    twice          dense training of twice the length, one seed: does the network still learn?
    trained-twice  ASP from the whole dense run: two trainings
    patterns       `choose` and `compare` at more patterns
    knobs          the one option of each other method, as `choose` does
    methods        every other method with its best option, at one or two patterns
    capacity       dense and SR-STE by the width of the network

ASP in an equal budget trains for half of the epochs dense and for half sparse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results_page import RESULTS, write_page

from openwork.cli.main import main as openwork

STAGES = ("choose", "compare", "twice", "trained-twice", "patterns", "knobs", "methods", "capacity")
_FINAL = "final"  # the folder that the stages with results share, with their dense runs


@dataclass(frozen=True)
class Protocol:
    """What all runs of a task have in common, and what is tried for each knob."""

    shared: str
    epochs: int
    steps: int  # of a run
    choose: str = ""  # how samples are found that are not the reported ones
    decays: str = "2e-4 2e-3 2e-2"
    patterns: str = "1:4"
    seeds: str = "0 1 2"
    methods: str = "transposable-sr-ste s-ste mdgf sdgf maxq"
    methods_at: str = "2:4"
    widths: str = ""  # of `capacity`
    window: int = 20  # of STEP: 1 / (1 - beta2)

    def commands(self, stage: str) -> list[tuple[str, str]]:
        """The folder and the arguments of each comparison of a stage."""
        tune, final = f"--seeds 9 {self.choose}", f"--seeds {self.seeds}"
        four = f"--methods dense asp ste sr-ste --equal_budget {final}"
        positive = " ".join(decay for decay in self.decays.split() if not decay.startswith("-"))
        lengths = [str(round(self.steps * share)) for share in (0.25, 0.5, 0.75)]
        ramps = " ".join(f"ramp={steps}" for steps in lengths)
        timed = " ".join(name for name in self.methods.split() if name in ("mdgf", "sdgf", "maxq", "step"))
        window = f"--window {self.window}" if "step" in timed.split() else ""
        at, best = f"--patterns {self.methods_at}", "--options_from knobs-decay knobs-steps"
        found = {
            "twice": [("twice", f"--methods dense --epochs {2 * self.epochs} --seeds 0")],
            "choose": [("choose", f"--methods sr-ste --decay {self.decays} --patterns 2:4 {tune}")],
            "compare": [(_FINAL, f"{four} --options_from choose --patterns 2:4")],
            "patterns": [
                ("choose-more", f"--methods sr-ste --decay {self.decays} --patterns {self.patterns} {tune}"),
                (_FINAL, f"{four} --options_from choose-more --patterns {self.patterns}"),
            ],
            "knobs": [
                ("knobs-decay", f"--methods transposable-sr-ste --decay {positive} {at} {tune}"),
                ("knobs-steps", f"--methods {timed} --steps {' '.join(lengths)} {window} {at} {tune}"),
                ("knobs-ramp", f"--methods ste --mask_schedule {ramps} {at} {tune}"),
            ],
            "trained-twice": [(_FINAL, f"--methods dense asp {final} --patterns 2:4")],
            "capacity": [
                (f"capacity-{width}", f"--width {width} --methods dense sr-ste --options_from choose --seeds 0 1 2")
                for width in self.widths.split()
            ],
            "methods": [
                (_FINAL, f"--methods dense {self.methods} {best} {at} {final}"),
                (_FINAL, f"--methods dense ste --options_from knobs-ramp {at} {final}"),
            ],
        }
        return found[stage]


PROTOCOLS = {
    "classification": Protocol(
        "--model resnet20-s2 --limit 6000 --batch_size 128 --channels_last --warmup 1 --validate_every 10",
        epochs=20,
        steps=920,
        choose="--hold_out 10000",
        decays="-2e-4 2e-4 2e-3 2e-2",
        patterns="4:8 1:4 2:8 1:8 1:16",
        seeds="0 1 2 3 4",
        methods_at="2:4 1:16",
        widths="4 8 24",
    ),
    "detection": Protocol(
        "--width 32 --fpn_channels 64 --image_size 128 --vertical_flip --channels_last --validate_every 50",
        epochs=18,
        steps=918,
        choose="--hold_out 50",
    ),
    "segmentation": Protocol(
        "--width 24 --fpn_channels 48 --image_size 128 --rpn_post_nms_top_n 200 --vertical_flip --channels_last "
        "--validate_every 50",
        epochs=6,
        steps=642,
        choose="--hold_out 80",
    ),
    "flow": Protocol(
        "--scenes 300 --warmup 0.5 --channels_last --validate_every 50",
        epochs=4,
        steps=300,
        choose="--hold_out 4",
        decays="2e-5 2e-4 2e-3",
    ),
    "translation": Protocol(
        "--lr 0.003 --warmup 0.2 --vocabulary 1000 --validation test --limit_val 1000 --validate_every 50",
        epochs=4,
        steps=2860,
        choose="--validation val",
        decays="2e-5 2e-4 2e-3",
        methods="transposable-sr-ste s-ste mdgf sdgf maxq step",
    ),
}


def words_of(task: str, folder: str, arguments: str, data: str, out: Path) -> list[str]:
    """A comparison as a command line, with folders in their place."""
    protocol, found, listing = PROTOCOLS[task], list[str](), False
    for word in arguments.split():
        listing = word == "--options_from" or (listing and not word.startswith("--"))
        found.append(str(out / word) if listing and not word.startswith("--") else word)
    length = [] if "--epochs" in found else ["--epochs", str(protocol.epochs)]
    place = ["--jobs", "1", "--threads", "1", "--out", str(out / folder)]
    return ["compare", task, "--data", data, *protocol.shared.split(), *length, *found, *place]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=PROTOCOLS)
    parser.add_argument("stages", nargs="*", metavar="stage", help="default: all")
    parser.add_argument("--data", required=True, help="as of `openwork compare`")
    parser.add_argument("--out", type=Path, help="default: runs/protocol-TASK")
    asked = parser.parse_args(words)
    if unknown := set(asked.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    out = asked.out or Path("runs", f"protocol-{asked.task}")
    for stage in asked.stages or STAGES:
        for folder, arguments in PROTOCOLS[asked.task].commands(stage):
            command = words_of(asked.task, folder, arguments, asked.data, out)
            print("openwork", *command, flush=True)
            if status := openwork(command):
                raise SystemExit(status)
            keep(asked.task, stage, out / folder, arguments)
            write_page()


def keep(task: str, stage: str, folder: Path, arguments: str) -> None:
    """Copies what a comparison found, with two things more: the scores of the dense runs of half the length, where
    there are any, and SAD since the start over the steps, of each method's run of the first seed."""
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    halves = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("half/*/result.json"))]
    if halves:
        document["half"] = [half[document["metrics"][0]["key"]] for half in halves]
    first, document["sad"] = document["config"]["seeds"][0], {}
    for path in sorted(folder.glob("*/result.json")):
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        asked = config["method"] in document["config"]["methods"] and config["seed"] == first
        if asked and (config["method"] == "dense" or config["pattern"] == document["config"]["patterns"][0]):
            document["sad"][config["method"]] = movement(path.with_name("topology.jsonl"))
    name = folder.name if folder.name != _FINAL else f"{stage}-ramp" if "knobs-ramp" in arguments else stage
    (RESULTS / f"{task}-{name}.json").write_text(json.dumps(document), encoding="utf-8")


def movement(topology: Path) -> list[tuple[int, float]]:
    """Steps, and the share of the weights that has changed sides since the start."""
    records = [json.loads(line) for line in topology.read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["sad_start"] / record["weights"]) for record in records]


if __name__ == "__main__":
    main()
