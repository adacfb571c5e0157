"""What a classification run is made of: one field per flag, the paper's preset, and checks that say what to do.

Defaults: the SR-STE authors' ImageNet recipe (SGD, momentum 0.9, weight decay 5e-5 on everything, linear warm-up,
cosine to zero per step, decay 2e-4; github.com/aojunzz/NM-sparsity, classification/configs) scaled to the digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import openwork as ow

FSDP2 = "fsdp2"  # ours: Lightning has no name for it
METHODS = ("dense", "asp", "ste", "sr-ste")
DATASETS = ("digits", "fashion-mnist=DIR", "cifar10=DIR", "imagefolder=DIR")

# arXiv:2102.04010 and its code: 120 epochs, batch 256, all convolutions sparse, the last layer dense.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model": "resnet50",
        "pattern": "2:4",
        "patterns": ["2:4"],
        "decay": 2e-4,
        "exclude": ["fc"],
        "epochs": 120,
        "batch_size": 256,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-5,
        "warmup": 5,
        "topology_every": 1000,
        "checkpoint_every": 2000,
    }
}

# These say where and how a run happens, not what it computes: they may differ between a run and its resumption.
_PLACE = ("out", "resume", "threads", "progress", "preset", "workers")


def flag(default: Any, text: str) -> Any:
    """A dataclass field that carries its help text."""
    return (
        field(default_factory=lambda: list(default), metadata={"help": text})
        if isinstance(default, list)
        else field(default=default, metadata={"help": text})
    )


@dataclass(frozen=True)
class Common:
    """The fields that `train` and `compare` share."""

    data: str = flag("digits", f"one of {', '.join(DATASETS)}")
    model: str = flag("resnet8", "resnet8, resnet20, ... (small images), any torchvision name, timm/NAME")
    exclude: list[str] = flag([], "globs of layers to leave dense; nothing is excluded by default")
    epochs: int = flag(15, "passes over the training data")
    batch_size: int = flag(64, "samples per optimizer step, over all devices and micro-batches")
    lr: float = flag(0.1, "peak learning rate")
    momentum: float = flag(0.9, "of SGD")
    weight_decay: float = flag(5e-5, "of SGD, on all parameters")
    warmup: float = flag(1.0, "epochs of linear warm-up, before cosine to zero")
    dropout: float = flag(0.0, "before the last layer (resnet8, resnet20, ...)")
    precision: str = flag("32-true", "Lightning's precision: 32-true, bf16-mixed, 16-mixed, ...")
    accumulate: int = flag(1, "micro-batches per optimizer step")
    devices: int = flag(1, "processes or GPUs of each machine")
    nodes: int = flag(1, "machines, each with --devices processes")
    strategy: str = flag("auto", "how processes share the work: auto, ddp, fsdp2, or another of Lightning's")
    accelerator: str = flag("auto", "Lightning's accelerator: auto, cpu, gpu, ...")
    threads: int = flag(0, "CPU threads of torch (0: torch's own choice)")
    workers: int = flag(2, "processes that decode images (imagefolder)")
    image_size: int = flag(224, "side of the images (imagefolder)")
    limit: int = flag(0, "use only so many training images (0: all)")
    checkpoint_every: int = flag(500, "optimizer steps between checkpoints; one more after each epoch")
    topology_every: int = flag(20, "optimizer steps between records of the masks")
    log_every: int = flag(10, "optimizer steps between lines of metrics.jsonl")
    progress: bool = flag(True, "show a progress bar")
    preset: str = flag("", f"recipe that fills the defaults: {', '.join(PRESETS)}")


@dataclass(frozen=True)
class Config(Common):
    """One training run."""

    pattern: str = flag("2:4", "N:M, at most N kept of every M")
    method: str = flag("sr-ste", f"one of {', '.join(METHODS)}")
    decay: float = flag(2e-4, "SR-STE's decay of pruned weights")
    seed: int = flag(0, "of initial weights, sample order and augmentation")
    init: str = flag("", "dense weights to start from: a run directory or a .safetensors file (asp needs it)")
    out: str = flag("runs/classification", "run directory")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint")

    def __post_init__(self) -> None:
        check_common(self)
        ow.Pattern.parse(self.pattern)
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not known; use one of {', '.join(METHODS)}")
        if self.method == "asp" and not self.init:
            raise ValueError(
                "method asp prunes a trained dense network: train one with --method dense --out DENSE, "
                "then give --init DENSE"
            )


@dataclass(frozen=True)
class CompareConfig(Common):
    """Several methods from the same seeds."""

    methods: list[str] = flag(["dense", "asp", "ste", "sr-ste"], "which methods to train")
    patterns: list[str] = flag(["2:4"], "one or several N:M")
    decays: list[float] = flag([2e-4], "SR-STE's decay; one row per value")
    seeds: list[int] = flag([0, 1, 2], "one run per seed")
    jobs: int = flag(0, "runs at a time, each with threads/jobs threads (0: one per core; with a GPU, one)")
    out: str = flag("runs/compare", "directory of the comparison, one subdirectory per run")

    def __post_init__(self) -> None:
        check_common(self)
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"methods {sorted(unknown)} are not known; use some of {', '.join(METHODS)}")
        for pattern in self.patterns:
            ow.Pattern.parse(pattern)
        if not (self.methods and self.patterns and self.decays and self.seeds):
            raise ValueError("methods, patterns, decays and seeds each need at least one value")
        if self.jobs < 0:
            raise ValueError(f"jobs is {self.jobs}; it must be at least 1, or 0 for one per core")


def check_common(config: Common) -> None:
    if config.preset and config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset!r} is not known; use one of {', '.join(PRESETS)}")
    for name in (
        "epochs",
        "batch_size",
        "accumulate",
        "devices",
        "nodes",
        "checkpoint_every",
        "topology_every",
        "log_every",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    check_strategy(config)
    parts = config.accumulate * config.devices * config.nodes
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} is the size of an optimizer step and must divide by "
            f"accumulate x devices x nodes = {parts}; use {config.batch_size // parts * parts or parts}"
        )
    if config.warmup >= config.epochs:
        raise ValueError(
            f"warmup of {config.warmup} epochs leaves nothing of {config.epochs}; shorten it or train longer"
        )


def check_strategy(config: Common) -> None:
    if config.strategy.startswith("fsdp") and config.strategy != FSDP2:
        raise ValueError(
            f"strategy {config.strategy!r} is Lightning's FSDP1, which cannot hold masked weights; use {FSDP2}"
        )


def build_method(config: Config) -> Any:
    makers = {"dense": ow.Dense, "asp": ow.ASP, "ste": ow.STE, "sr-ste": lambda: ow.SRSTE(decay=config.decay)}
    return makers[config.method]()


def recipe(config: Common | dict[str, Any]) -> dict[str, Any]:
    """The fields that decide what a run computes."""
    values = config if isinstance(config, dict) else asdict(config)
    return {name: value for name, value in values.items() if name not in _PLACE}


def differences(old: dict[str, Any], new: Common) -> list[str]:
    """What a stored configuration and a new one would compute differently, as "field: old -> new"."""
    a, b = recipe(old), recipe(new)
    return [f"{name}: {a.get(name)!r} -> {b.get(name)!r}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def field_names(cls: type) -> Sequence[str]:
    return [f.name for f in fields(cls)]


def data_folder(spec: str) -> tuple[str, Path | None]:
    """("fashion-mnist", folder) for "fashion-mnist=FOLDER"; the folder exists."""
    name, _, folder = spec.partition("=")
    known = [d.partition("=")[0] for d in DATASETS]
    if name not in known:
        raise ValueError(f"data {spec!r} is not known; use one of {', '.join(DATASETS)}")
    if name == "digits":
        return name, None
    if not folder:
        raise ValueError(f"data {spec!r} lacks its folder; write {name}=DIR")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"data {spec!r}: there is no folder {folder}; {_LAYOUT[name]}")
    return name, Path(folder)


_LAYOUT = {
    "fashion-mnist": "it must hold train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files",
    "cifar10": "it must hold data_batch_1 to data_batch_5 and test_batch, as python or .bin files",
    "imagefolder": "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg",
}
