"""A run directory: JSON lines that a resumed run cuts back to its checkpoint, and files that appear whole or never."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from openwork.utils import atomic

LINES = ("metrics.jsonl", "topology.jsonl", "times.jsonl")  # times differ from run to run, the others may not


def first_process() -> bool:
    """Whether this is the only process, or the one of several, on all machines, that reads and writes for all."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, and makes the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none if it is missing. A last line cut by a kill is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class RunDir:
    """Paths and appended lines of one run. Offsets go into its checkpoints."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    checkpoint = property(lambda self: self.path / "checkpoints" / "last.ckpt")
    model = property(lambda self: self.path / "model.safetensors")
    result = property(lambda self: self.path / "result.json")
    visualizations = property(lambda self: self.path / "visualizations.json")

    def append(self, name: str, record: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

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
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def read_visualizations(self) -> list[dict[str, Any]]:
        return json.loads(self.visualizations.read_text(encoding="utf-8")) if self.visualizations.exists() else []

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.result, json.dumps(result, indent=1))

    def read_result(self) -> dict[str, Any] | None:
        return json.loads(self.result.read_text(encoding="utf-8")) if self.result.exists() else None
