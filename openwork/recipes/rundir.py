"""A run directory: JSON lines that a resumed run cuts back to its checkpoint, and files that appear whole or never."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openwork.recipes.checkpoints import Checkpoints
from openwork.recipes.json_files import read_json, to_json
from openwork.recipes.json_files import read_lines as read_lines
from openwork.recipes.yaml_files import read_yaml, write_yaml
from openwork.utils import atomic

LINES = ("metrics.jsonl", "topology.jsonl", "times.jsonl")  # times differ from run to run, the others may not


def first_process() -> bool:
    """Whether this is the only process, or the one of several, on all machines, that reads and writes for all."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, and makes the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)


@dataclass(frozen=True)
class RunDir:
    """Paths and appended lines of one run. Offsets go into its checkpoints."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    checkpoints = property(lambda self: Checkpoints(self.path / "checkpoints"))
    model = property(lambda self: self.path / "model.safetensors")
    network = property(lambda self: self.path / "network.json")
    result = property(lambda self: self.path / "result.json")
    visualizations = property(lambda self: self.path / "visualizations.json")
    diverged = property(lambda self: self.path / "diverged.json")
    report = property(lambda self: self.path / "report.html")

    def append(self, name: str, record: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def offsets(self) -> dict[str, int]:
        """Bytes written so far, per file, safely on disk."""
        sizes = dict.fromkeys(LINES, 0)
        for name in LINES:
            if (self.path / name).exists():
                with (self.path / name).open("ab") as file:
                    os.fsync(file.fileno())
                    sizes[name] = file.tell()
        return sizes

    def rewind(self, offsets: dict[str, int]) -> None:
        """Cuts the files back to a checkpoint's offsets."""
        written = self.offsets()
        for name in LINES:
            wanted = offsets.get(name, 0)
            if written[name] < wanted:
                raise ValueError(
                    f"{self.path / name} is shorter than its checkpoint says; it was edited, so the run "
                    "cannot be resumed: start anew in another --out"
                )
            if (self.path / name).exists():
                os.truncate(self.path / name, wanted)

    def write_config(self, values: dict[str, Any]) -> None:
        write_yaml(self.config, values)

    def read_config(self) -> dict[str, Any]:
        """The fields of config.yaml; FileNotFoundError or ValueError says what is there instead."""
        if not self.config.exists():
            raise FileNotFoundError(f"{self.path} is no run directory: it has no {self.config.name}")
        values = read_yaml(self.config, "restore the file, or train again in another --out")
        if lacks := [name for name in ("task", "method", "pattern") if not isinstance(values.get(name), str)]:
            raise ValueError(
                f"{self.config} does not say the {', '.join(lacks)} of its run; restore the file, or train again in "
                "another --out"
            )
        return values

    def write_network(self, facts: dict[str, Any]) -> None:
        if facts:
            write_text(self.network, to_json(facts))

    def read_network(self) -> dict[str, Any]:
        """What the network takes from its data, such as the classes; {} where nothing was written."""
        if not self.network.exists():
            return {}
        return read_json(self.network, dict, "remove it: the data of the run tells the same")

    def read_visualizations(self) -> list[dict[str, Any]]:
        if not self.visualizations.exists():
            return []
        return read_json(self.visualizations, list, "remove it to have a report without samples")

    def write_visualizations(self, samples: list[dict[str, Any]]) -> None:
        write_text(self.visualizations, to_json(samples))

    def write_diverged(self, record: dict[str, Any]) -> None:
        write_text(self.diverged, to_json(record))

    def read_diverged(self) -> dict[str, Any] | None:
        """The step and what was not finite, of a run that stopped there and has not finished since."""
        if not self.diverged.exists() or self.result.exists():
            return None
        record = read_json(self.diverged, dict, "remove it to train on from the last checkpoint")
        return {"step": 0, "what": "its numbers were not finite", **record}

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.result, to_json(result, indent=1))

    def read_result(self) -> dict[str, Any] | None:
        """What a finished run found; None of one that has not finished."""
        if not self.result.exists():
            return None
        return read_json(self.result, dict, "remove it, and `openwork train ... --resume` makes it again")
