"""Every method in one protocol on equal terms: "Methods side by side" in docs/results.md.

    python benchmarks/methods.py classification --data fashion-mnist=DIR       # hours of one core; goes on if stopped
    python benchmarks/methods.py language --data text=input.txt
    python benchmarks/mask_changes.py methods-classification.json ...          # accuracy against SAD and flip rate

First the choice of options: each method that has one gets three values, on one seed that the final runs do not have,
validated on samples that nothing else sees. Then the runs themselves, each method with what was best there. All train
the same network with the same optimizer for the same number of steps; ASP trains for half of them dense and for half
sparse. The results become benchmarks/results/methods-TASK.json and ...-ramp.json, and a table of the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results_page import RESULTS
from results_page import main as write_page

from openwork.cli.main import main as openwork


@dataclass(frozen=True)
class Protocol:
    """What all runs of a task share, and what is tried for each knob. `steps`: of one run. `choose`: how to validate
    on samples that are not the reported ones."""

    task: str
    shared: str
    choose: str
    patterns: str
    steps: int
    decays: str
    window: int = 20
    """of STEP: 1 / (1 - beta2)"""

    def shares(self, *parts: float) -> list[str]:
        """Shares of a run, in steps."""
        return [str(round(self.steps * part)) for part in parts]

    def comparisons(self) -> list[tuple[str, str]]:
        """The arguments of `openwork compare`, and the folder of each, in the order in which they depend."""
        lengths = self.shares(0.25, 0.5, 0.75)
        ramps = " ".join(f"ramp={steps}" for steps in lengths)
        tune = f"--seeds 9 {self.choose}"
        final = "--seeds 0 1 2"
        decayed, timed = "sr-ste transposable-sr-ste", "mdgf sdgf maxq step"
        others = "dense asp ste s-ste --equal_budget"
        return [
            ("tune-decay", f"--methods {decayed} --decay {self.decays} {tune}"),
            ("tune-steps", f"--methods {timed} --steps {' '.join(lengths)} --window {self.window} {tune}"),
            ("tune-ramp", f"--methods ste --mask_schedule {ramps} {tune}"),
            ("final", f"--methods {decayed} {timed} {others} --options_from tune-decay tune-steps {final}"),
            ("final-ramp", f"--methods dense ste --options_from tune-ramp {final}"),
        ]


_IMAGES = (
    "--model resnet20-s2 --limit 6000 --epochs 20 --batch_size 128 --warmup 1 --channels_last "
    "--optimizer adamw --lr 2e-3 --betas 0.9 0.95 --weight_decay 0.05"
)
PROTOCOLS = {
    "classification": Protocol("classification", _IMAGES, "--hold_out 10000", "2:4 1:16", 920, "2e-4 2e-3 2e-2"),
}


def words_of(protocol: Protocol, folder: str, words: str, data: str, out: Path) -> list[str]:
    """A comparison as a command line. `final-ramp` shares the dense runs of `final`."""
    folders = {"--options_from"}
    found, listing = list[str](), False
    for word in words.split():
        listing = word in folders or (listing and not word.startswith("--"))
        found.append(str(out / word) if listing and not word.startswith("--") else word)
    place = out / folder.removesuffix("-ramp") if folder.startswith("final") else out / folder
    shared = [*protocol.shared.split(), "--patterns", *protocol.patterns.split(), "--jobs", "1", "--threads", "1"]
    return ["compare", protocol.task, "--data", data, *shared, *found, "--out", str(place)]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=PROTOCOLS)
    parser.add_argument("--data", required=True, help="as of `openwork compare`")
    parser.add_argument("--out", type=Path, help="default: runs/methods-TASK")
    asked = parser.parse_args(words)
    out = asked.out or Path("runs", f"methods-{asked.task}")
    protocol = PROTOCOLS[asked.task]
    for folder, arguments in protocol.comparisons():
        command = words_of(protocol, folder, arguments, asked.data, out)
        print("openwork", *command, flush=True)
        if status := openwork(command):
            raise SystemExit(status)
        if folder.startswith("final"):
            name = f"methods-{asked.task}{folder.removeprefix('final')}.json"
            source = json.loads((out / "final" / "results.json").read_text(encoding="utf-8"))
            (RESULTS / name).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    write_page()


if __name__ == "__main__":
    main()
