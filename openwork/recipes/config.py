"""What a run is made of: one field per flag, presets, and checks that say what to do.

A task derives its own class from `Config`, with defaults and fields of its own; `comparison` makes the class for
`openwork compare` of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, get_type_hints

import openwork as ow
from openwork.recipes.stepping import SCHEDULES

FSDP2 = "fsdp2"  # ours: Lightning has no name for it
METHODS = ("dense", "asp", "ste", "sr-ste", "transposable-sr-ste")
DECAYED = ("sr-ste", "transposable-sr-ste")
REFRESHED = ("transposable-sr-ste",)  # methods whose masks stay for some steps
_EVERY = ("checkpoint_every", "topology_every", "log_every", "validate_every", "refresh_every")
OPTIMIZERS = ("sgd", "adam", "adamw")
REMAINDERS = ("skip", "pad", "error")

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
class Source:
    """A data set by name. `layout` says what its folder must hold; "" where it needs none."""

    name: str
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.name}=DIR" if self.layout else self.name


def flag_of(sources: Sequence[Source]) -> Any:
    """The field `data`; the first source is the default."""
    return flag(sources[0].name, f"one of {', '.join(map(str, sources))}")


@dataclass(frozen=True)
class Common:
    """The fields that `train` and `compare` share, for every task."""

    task: ClassVar[str]
    sources: ClassVar[Sequence[Source]]
    presets: ClassVar[dict[str, dict[str, Any]]]

    data: str = flag("", "the data set")
    model: str = flag("", "the network")
    exclude: list[str] = flag([], "globs of layers to leave dense; nothing is excluded by default")
    remainder: str = flag("skip", f"where M does not divide a weight's axis: {', '.join(REMAINDERS)}")
    epochs: int = flag(15, "passes over the training data")
    batch_size: int = flag(64, "samples per optimizer step, over all devices and micro-batches")
    optimizer: str = flag("sgd", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = flag(0.1, "peak learning rate")
    momentum: float = flag(0.9, "of SGD")
    betas: list[float] = flag([0.9, 0.999], "of Adam and AdamW")
    eps: float = flag(1e-8, "of Adam and AdamW")
    weight_decay: float = flag(5e-5, "on all parameters")
    clip: float = flag(0.0, "largest norm of the gradient (0: not clipped)")
    warmup: float = flag(1.0, "epochs of linear warm-up, before the schedule")
    schedule: str = flag("cosine", f"of the learning rate: {', '.join(SCHEDULES)}")
    drops: list[float] = flag([], "epochs after which the schedule steps divides the rate by ten")
    precision: str = flag("32-true", "Lightning's precision: 32-true, bf16-mixed, 16-mixed, ...")
    accumulate: int = flag(1, "micro-batches per optimizer step")
    devices: int = flag(1, "processes or GPUs of each machine")
    nodes: int = flag(1, "machines, each with --devices processes")
    strategy: str = flag("auto", "how processes share the work: auto, ddp, fsdp2, or another of Lightning's")
    accelerator: str = flag("auto", "Lightning's accelerator: auto, cpu, gpu, ...")
    threads: int = flag(0, "CPU threads of torch (0: torch's own choice)")
    workers: int = flag(2, "processes that load samples from files")
    limit: int = flag(0, "use only so many training samples (0: all)")
    limit_val: int = flag(0, "use only so many validation samples (0: all)")
    skip_bad: bool = flag(False, "leave out samples that cannot be read, and count them, instead of stopping")
    checkpoint_every: int = flag(500, "optimizer steps between checkpoints; one more after each epoch")
    validate_every: int = flag(1, "epochs between validations; there is one more of the finalized network")
    topology_every: int = flag(20, "optimizer steps between records of the masks")
    log_every: int = flag(10, "optimizer steps between lines of metrics.jsonl")
    refresh_every: int = flag(40, "optimizer steps between choices of the masks (transposable-sr-ste)")
    progress: bool = flag(True, "show a progress bar")
    preset: str = flag("", "recipe that fills the defaults, if the task has one: paper")

    def check(self) -> None:
        """What only this task can say about its values."""


@dataclass(frozen=True)
class Config(Common):
    """One training run."""

    pattern: str = flag("2:4", "N:M, at most N kept of every M")
    method: str = flag("sr-ste", f"one of {', '.join(METHODS)}")
    decay: float = flag(2e-4, "SR-STE's decay of pruned weights")
    seed: int = flag(0, "of initial weights, sample order and augmentation")
    init: str = flag("", "dense weights to start from: a run directory or a .safetensors file (asp needs it)")
    out: str = flag("runs/run", "run directory")
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
        self.check()


def default(name: str, value: Any) -> Any:
    """The field `name` of every task with another default: the help text is kept."""
    return flag(value, Config.__dataclass_fields__[name].metadata["help"])


@dataclass(frozen=True)
class CompareConfig(Common):
    """Several methods from the same seeds."""

    run: ClassVar[type[Config]]

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
        self.run.check(cast(Config, self))


def comparison(run: type[Config]) -> type[CompareConfig]:
    """The configuration of `openwork compare` for a task: the fields of its runs but those that a comparison varies."""
    varied = {each.name for each in fields(Config)} - {each.name for each in fields(Common)}
    hints, own = get_type_hints(run), {each.name for each in fields(run)} - varied
    return make_dataclass(
        f"Compare{run.__name__}",
        [(each.name, hints[each.name], _copy(each)) for each in fields(run) if each.name in own]
        + [("out", str, flag(f"runs/compare-{run.task}", "directory of the comparison, one subdirectory per run"))],
        bases=(CompareConfig,),
        frozen=True,
        namespace={"task": run.task, "sources": run.sources, "presets": run.presets, "run": run},
    )


def _copy(each: Any) -> Any:
    if callable(each.default_factory):
        return field(default_factory=each.default_factory, metadata=each.metadata)
    return field(default=each.default, metadata=each.metadata)


def check_common(config: Common) -> None:
    if config.preset and config.preset not in config.presets:
        raise ValueError(f"preset {config.preset!r} is not known; use one of {', '.join(config.presets)}")
    for name in ("epochs", "batch_size", "accumulate", "devices", "nodes", *_EVERY):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("limit", "limit_val", "clip", "warmup"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must not be negative")
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("remainder", REMAINDERS)):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} {getattr(config, name)!r} is not known; use one of {', '.join(known)}")
    if len(config.betas) != 2:
        raise ValueError(f"betas are {config.betas}; Adam takes two")
    if config.schedule == "steps" and not config.drops:
        raise ValueError("the schedule steps needs the epochs of its steps: --drops 8 11")
    if config.strategy.startswith("fsdp") and config.strategy != FSDP2:
        raise ValueError(
            f"strategy {config.strategy!r} is Lightning's FSDP1, which cannot hold masked weights; use {FSDP2}"
        )
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


def values_of(config: Common) -> dict[str, Any]:
    """All fields, with the name of the task, as a run directory keeps them."""
    return {"task": config.task, **asdict(config)}


def recipe(config: Common | dict[str, Any]) -> dict[str, Any]:
    """The fields that decide what a run computes."""
    values = config if isinstance(config, dict) else values_of(config)
    return {name: value for name, value in values.items() if name not in _PLACE}


def differences(old: dict[str, Any], new: Common) -> list[str]:
    """What a stored configuration and a new one would compute differently, as "field: old -> new". A flag that is newer
    than the stored one had its default."""
    a, b = recipe(values_of(type(new)()) | old), recipe(new)
    return [f"{name}: {a.get(name)!r} -> {b.get(name)!r}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def field_names(cls: type) -> Sequence[str]:
    return [f.name for f in fields(cls)]


def source_of(config: Common) -> tuple[str, Path | None]:
    """("fashion-mnist", folder) for --data fashion-mnist=FOLDER; the folder exists. No folder where none is needed."""
    name, _, folder = config.data.partition("=")
    known = {source.name: source for source in config.sources}
    if name not in known:
        raise ValueError(f"data {config.data!r} is not known; use one of {', '.join(map(str, config.sources))}")
    if not known[name].layout:
        if folder:
            raise ValueError(f"data {config.data!r}: {name} takes no folder; write --data {name}")
        return name, None
    if not folder:
        raise ValueError(f"data {config.data!r} lacks its folder; write {name}=DIR")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"data {config.data!r}: there is no folder {folder}; it must hold {known[name].layout}")
    return name, Path(folder)
