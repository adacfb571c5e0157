"""What a run is made of: one field per flag, presets, and checks that say what to do.

A task derives its own class from `Config`, with defaults and fields of its own; `comparison` makes the class for
`openwork compare` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

import openwork as ow
from openwork.methods import METHODS
from openwork.recipes.method_flags import (
    build_method,
    check_methods,
    check_options,
    defaults_of,
    starts_trained,
)

FSDP2 = "fsdp2"  # ours: Lightning has no name for it
SCHEDULES = ("cosine", "linear", "steps", "inverse-sqrt", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw")
REMAINDERS = ("skip", "pad", "error")

# These say where and how a run happens, not what it computes: they may differ between a run and its resumption.
_PLACE = ("out", "resume", "threads", "progress", "preset", "workers", "allow_nan", "follow_links")

C = TypeVar("C", bound="Config")


def flag(default: Any, text: str) -> Any:
    """A dataclass field that carries its help text."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataSource:
    """A data set by name. `layout` says what its folder must hold; "" where it needs none. `place` is what is named."""

    name: str
    layout: str = ""
    place: str = "DIR"

    def __str__(self) -> str:
        return f"{self.name}={self.place}" if self.layout else self.name


def data_flag(sources: Sequence[DataSource]) -> Any:
    """The field `data`; the first source is the default."""
    return flag(sources[0].name, f"one of {', '.join(map(str, sources))}")


def rates(**other: float) -> dict[str, float]:
    """The usual learning rate of each optimizer; `other` where a task has its own."""
    return {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, **other}


DEPENDENT = ("batch_size", "lr", "warmup", "milestones", "image_size", "max_size")
"""Fields whose defaults give way to other flags: a preset does not set them, `fitting` does."""


@dataclass(frozen=True)
class Common:
    """The fields that `train` and `compare` share, for every task."""

    task: ClassVar[str]
    sources: ClassVar[Sequence[DataSource]]
    presets: ClassVar[Mapping[str, dict[str, Any]]] = MappingProxyType({})
    usual: ClassVar[Mapping[str, Any]]  # defaults that give way to other flags: `fitting` has the rules

    data: str = flag("", "the data set")
    model: str = flag("", "the network")
    init: str = flag("", "weights to start from: a run directory or a .safetensors file (train: asp needs them)")
    teacher: str = flag("", "a trained network to learn from as well: a run or a .safetensors file")
    teacher_weight: float = flag(1 / 3, "share of the teacher in the loss; the rest is the data's")  # AST's and CAST's
    exclude: list[str] = flag([], "globs of layers to leave dense; nothing is excluded by default")
    remainder: str = flag("skip", f"where M does not divide a weight's axis: {', '.join(REMAINDERS)}")
    epochs: int = flag(15, "passes over the training data")
    batch_size: int = flag(None, "samples per optimizer step, over all devices and micro-batches")
    optimizer: str = flag("sgd", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = flag(None, "peak learning rate")
    momentum: float = flag(0.9, "of SGD")
    betas: list[float] = flag([0.9, 0.999], "of Adam and AdamW")
    eps: float = flag(1e-8, "of Adam and AdamW")
    weight_decay: float = flag(5e-5, "on all parameters")
    clip: float = flag(0.0, "largest norm of the gradient (0: not clipped)")
    warmup: float = flag(
        None,
        "epochs of linear warm-up, before the schedule (default: half of them at most)",
    )
    schedule: str = flag("cosine", f"of the learning rate: {', '.join(SCHEDULES)}")
    milestones: list[float] = flag(
        None, "epochs after which the schedule steps divides the rate by ten (default: at 1/2 and 3/4 of the epochs)"
    )
    precision: str = flag("32-true", "Lightning's precision: 32-true, bf16-mixed, 16-mixed, ...")
    channels_last: bool = flag(False, "convolutions with the channels last in memory: quicker, with other roundings")
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
    follow_links: bool = flag(False, "read files of the data set that are symbolic links to places outside its folder")
    allow_nan: bool = flag(False, "train on where the loss, a weight or a score is not finite, instead of stopping")
    checkpoint_every: int = flag(500, "optimizer steps between checkpoints; one more after each epoch")
    validate_every: int = flag(1, "epochs between validations; there is one more of the finalized network")
    topology_every: int = flag(20, "optimizer steps between records of the masks")
    log_every: int = flag(10, "optimizer steps between lines of metrics.jsonl")
    progress: bool = flag(True, "show a progress bar")
    preset: str = flag("", "recipe that fills the defaults, if the task has one: paper")

    def check(self) -> None:
        """What only this task can say about its values."""

    def fitting(self) -> dict[str, Any]:
        """The defaults of flags that were not given, None until here, fitted to those that were."""
        preset = self.presets.get(self.preset, {})
        usual = {**self.usual, **preset}
        parts, batch = self.accumulate * self.devices * self.nodes, usual["batch_size"]
        batch = min(batch, self.limit) if self.limit > 0 else batch
        if isinstance(rate := usual["lr"], Mapping):
            rate = rate.get(self.optimizer)
        elif self.optimizer != preset.get("optimizer", type(self).optimizer):  # a preset's rate is its optimizer's
            rate = self.usual["lr"].get(self.optimizer)
        milestones = preset.get("milestones", [self.epochs / 2, self.epochs * 3 / 4])  # He et al. 2015, section 4.2
        share = self.epochs / preset["epochs"] if "milestones" in preset else 1
        return {
            "batch_size": max(1, batch // max(1, parts)) * parts,
            "lr": rate,
            "warmup": usual["warmup"] if usual["warmup"] < self.epochs else self.epochs / 2,
            "milestones": [m * share for m in milestones] if self.schedule == "steps" else [],
        }


@dataclass(frozen=True)
class Config(Common):
    """One training run. `method_options` are fields of the method's dataclass; those not given have its defaults."""

    pattern: str = flag("2:4", "N:M, at most N kept of every M")
    method: str = flag("sr-ste", f"one of {', '.join(METHODS)}")
    method_options: dict[str, Any] = flag({}, "of the method")
    seed: int = flag(0, "of initial weights, sample order and augmentation")
    out: str = flag("runs/run", "run directory")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint")

    def __post_init__(self) -> None:
        fit_defaults(self, self.fitting)
        check_common(self)
        ow.Pattern.parse(self.pattern)
        check_methods([self.method])
        check_options(self.method_options, [self.method])
        object.__setattr__(self, "method_options", {**defaults_of(self.method), **self.method_options})
        build_method(self.method, self.method_options)  # which checks its values
        if starts_trained(self.method) and not self.init:
            raise ValueError(
                f"method {self.method} prunes a trained dense network: train one with --method dense --out DENSE, "
                "then give --init DENSE"
            )
        self.check()

    @classmethod
    def from_values(cls: type[C], values: Mapping[str, Any]) -> C:
        """The configuration that `values_of` told; what is no field of it is an option of the method."""
        names = {item.name for item in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**known, method_options={n: v for n, v in values.items() if n not in names and n != "task"})


def default(name: str, value: Any) -> Any:
    """The field `name` of every task with another default: the help text is kept."""
    return flag(value, Config.__dataclass_fields__[name].metadata["help"])


@dataclass(frozen=True)
class CompareConfig(Common):
    """Several methods from the same seeds. `method_options` has the values of each: a row for each combination."""

    run: ClassVar[type[Config]]

    methods: list[str] = flag(["dense", "asp", "ste", "sr-ste"], f"which methods to train, of {', '.join(METHODS)}")
    patterns: list[str] = flag(["2:4"], "one or several N:M")
    method_options: dict[str, list[Any]] = flag({}, "of the methods")
    options_from: list[str] = flag([], "comparisons (directories) whose best options each method gets")
    equal_budget: bool = flag(False, "asp trains for half of the epochs dense and half sparse, not all of them twice")
    seeds: list[int] = flag([0, 1, 2], "one run per seed")
    jobs: int = flag(0, "runs at a time, each with threads/jobs threads (0: one per core; with a GPU, one)")
    out: str = flag("runs/compare", "directory of the comparison, one subdirectory per run")

    def __post_init__(self) -> None:
        fit_defaults(self, lambda: self.run.fitting(cast(Config, self)))
        check_common(self)
        check_methods(self.methods)
        check_options(self.method_options, self.methods)
        for pattern in self.patterns:
            ow.Pattern.parse(pattern)
        if not all([self.methods, self.patterns, self.seeds, *self.method_options.values()]):
            raise ValueError("methods, patterns, seeds and options of methods each need at least one value")
        if self.options_from and self.method_options:
            raise ValueError(f"--options_from and --{next(iter(self.method_options))}: give one of them")
        if self.equal_budget and self.epochs % 2:
            raise ValueError(f"--equal_budget halves the epochs, and {self.epochs} is odd; give an even number")
        if self.jobs < 0:
            raise ValueError(f"jobs is {self.jobs}; it must be at least 1, or 0 for one per core")
        self.run.check(cast(Config, self))


def comparison(run: type[Config]) -> type[CompareConfig]:
    """The configuration of `openwork compare` for a task: the fields of its runs but those that a comparison varies."""
    varied = {item.name for item in fields(Config)} - {item.name for item in fields(Common)}
    hints = get_type_hints(run)
    kept = [(item.name, hints[item.name], flag_of(item)) for item in fields(run) if item.name not in varied]
    out = flag(f"runs/compare-{run.task}", "directory of the comparison, one subdirectory per run")
    return make_dataclass(
        f"Compare{run.__name__}",
        [*kept, ("out", str, out)],
        bases=(CompareConfig,),
        frozen=True,
        namespace={"task": run.task, "sources": run.sources, "presets": run.presets, "usual": run.usual, "run": run},
    )


def flag_of(item: Any) -> Any:
    """A field like another one."""
    return flag(default_of(item), item.metadata["help"])


def default_of(item: Any) -> Any:
    return item.default_factory() if callable(item.default_factory) else item.default


def fit_defaults(config: Common, fitting: Callable[[], Mapping[str, Any]]) -> None:
    """Give the fields that are None the values that fit the others."""
    names = [name for name in DEPENDENT if getattr(config, name, 0) is None]
    for name, value in (fitting() if names else {}).items():
        if name in names:
            object.__setattr__(config, name, value)


def check_common(config: Common) -> None:
    if config.preset and config.preset not in config.presets:
        advice = f"use one of {', '.join(config.presets)}" if config.presets else "this task has none: leave it out"
        raise ValueError(f"preset {config.preset!r} is not known; {advice}")
    at_least_one = ("epochs", "batch_size", "accumulate", "devices", "nodes")
    every = ("checkpoint_every", "topology_every", "log_every", "validate_every")
    not_negative = ("limit", "limit_val", "hold_out", "clip", "warmup")
    for names, least in (((*at_least_one, *every), 1), (not_negative, 0)):
        for name in names:
            if getattr(config, name, 0) < least:
                what = "be at least 1" if least else "not be negative"
                raise ValueError(f"{name} is {getattr(config, name)}; it must {what}")
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("remainder", REMAINDERS)):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} {getattr(config, name)!r} is not known; use one of {', '.join(known)}")
    if not 0 < config.teacher_weight <= 1:
        raise ValueError(f"teacher_weight is {config.teacher_weight}; it must be greater than 0, and at most 1")
    if len(config.betas) != 2:
        raise ValueError(f"betas are {config.betas}; Adam takes two")
    if config.schedule == "steps" and not config.milestones:
        raise ValueError("the schedule steps needs the epochs of its steps: --milestones 8 11")
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
            f"--warmup {config.warmup:g} leaves nothing of --epochs {config.epochs:g}; give a shorter one "
            "(--warmup 0), or train longer"
        )


def check_choice(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")


def values_of(config: Common) -> dict[str, Any]:
    """All fields and the options of the method, with the name of the task, as a run directory keeps them."""
    values = {"task": config.task, **asdict(config)}
    return values | values.pop("method_options", {})


def differences(old: Mapping[str, Any], new: Config) -> list[str]:
    """What a stored configuration and a new one would compute differently, as "field: old -> new". A flag that is newer
    than the stored one had its default."""
    default = type(new)()
    plain = {name: value for name, value in asdict(default).items() if name != "method_options"}
    a = {"task": new.task, **plain, **defaults_of(old.get("method", default.method)), **old}
    b = values_of(new)
    names = sorted({*a, *b} - {*_PLACE})
    return [f"{name}: {a.get(name)!r} -> {b.get(name)!r}" for name in names if a.get(name) != b.get(name)]


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
