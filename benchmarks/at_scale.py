"""What the presets would take on 8 GPUs: writes the tables of docs/scale.md between `<!-- at scale -->` and its end.

    python benchmarks/at_scale.py

Computed from the presets themselves: steps from the data set's size, batch and epochs; weights and bytes from the
network, built without memory, and what `ow.sparsify` makes sparse in it. Published, each with its source: how long a
dense step takes elsewhere. Nothing is trained or timed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_tables import between, table

import openwork as ow
from openwork.recipes import find
from openwork.recipes.data import Data
from openwork.recipes.method_flags import build_method
from openwork.recipes.parser import parse

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
GPUS = 8
_MB = 1e6
# Bytes a weight, float32. Dense: the weight, its gradient, and of the optimizer momentum or two moments. Added, as
# docs/scale.md, "Memory of a process": the masked weight and the mask from the forward pass on; while the optimizer
# steps, a copy of the gradient (docs/results.md, "Time and memory of a training step").
_STATE = {"sgd": 4, "adam": 8, "adamw": 8}
_HELD, _STEPPING = 5, 4
_TRAFFIC = 8, 12  # bytes a weight: read and write it masked; read it and its gradient, write the copy with the decay


@dataclass(frozen=True)
class DataSet:
    """A published data set: training samples, what its networks are built for, and the flags that name it."""

    name: str
    samples: int
    info: Any
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """How fast others train the network, in samples a second or seconds a step of the preset's batch, and the memory
    that each GPU takes."""

    what: str
    source: str
    samples_per_second: float = 0
    seconds_per_step: float = 0
    memory: str = "-"

    def hours(self, steps: int, batch: int) -> float:
        seconds = self.seconds_per_step or batch / self.samples_per_second
        return steps * seconds / 3600


@dataclass(frozen=True)
class Size:
    """A preset's run: optimizer steps, its batch, and weights: all, trained, sparse, sparse and trained."""

    steps: int
    batch: int
    optimizer: str
    all: int
    trained: int
    sparse: int
    sparse_trained: int

    @property
    def dense_bytes(self) -> int:
        """Of each process under DDP, without activations and buffers."""
        return 4 * self.all + (4 + _STATE[self.optimizer]) * self.trained

    @property
    def added_bytes(self) -> tuple[int, int]:
        """From the forward pass to the backward pass; while the optimizer steps."""
        return _HELD * self.sparse, _STEPPING * self.sparse_trained

    @property
    def traffic(self) -> int:
        """Bytes that a step reads and writes for masks and decay, where each is one fused pass."""
        return _TRAFFIC[0] * self.sparse + _TRAFFIC[1] * self.sparse_trained


_BACKBONE = ("--backbone", "IMAGENET_RUN")
_COCO = DataSet("COCO train2017", 118_287, SimpleNamespace(classes=range(80)), ("--data", "coco=DIR", *_BACKBONE))
_WORDS = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab_size=lambda: 37_000))
DATA = {
    "classification": DataSet(
        "ImageNet-1k", 1_281_167, SimpleNamespace(classes=1000, channels=3), ("--data", "imagefolder=DIR")
    ),
    "detection": _COCO,
    "segmentation": _COCO,
    "translation": DataSet(
        "WMT14 en-de, about", 4_500_000, _WORDS, ("--data", "wmt14=DIR", "--validation", "newstest2014")
    ),
}
RUNS = [
    ("classification", "paper"),
    ("detection", "paper"),
    ("detection", "paper-2x"),
    ("segmentation", "paper"),
    ("segmentation", "paper-2x"),
    ("translation", "paper"),
]
_NVIDIA = (
    "https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
)
_ZOO = "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md"
PUBLISHED = {
    "classification": [
        Published("8 A100 80GB, mixed precision, 16,621 images/s", f"[NVIDIA]({_NVIDIA})", samples_per_second=16_621),
        Published("8 A100 80GB, TF32, 7,248 images/s", f"[NVIDIA]({_NVIDIA})", samples_per_second=7_248),
        Published("8 V100 32GB, float32, 2,766 images/s", f"[NVIDIA]({_NVIDIA})", samples_per_second=2_766),
    ],
    "detection": [
        Published("8 V100, 0.210 s/step of 16 images", f"[detectron2]({_ZOO})", seconds_per_step=0.210, memory="3.0 GB")
    ],
    "segmentation": [
        Published("8 V100, 0.261 s/step of 16 images", f"[detectron2]({_ZOO})", seconds_per_step=0.261, memory="3.4 GB")
    ],
    "translation": [
        Published(
            "8 P100, 0.4 s/step of 25,000 subwords a side",
            "[arXiv:1706.03762, 5.2](https://arxiv.org/abs/1706.03762)",
            seconds_per_step=0.4,
        )
    ],
}


_COMPUTED = """\
Computed, for each of 8 processes under DDP in float32, activations not counted. *Dense*: weights, gradients, the
optimizer's state. *Sparse adds*: masked weights and masks from the forward pass on; then a copy of the gradients
while the optimizer steps."""
_PUBLISHED = """\
Published, and multiplied with the steps above. *MB a step for sparsity*, computed: what each process reads and writes
to mask its weights once and to add the decay once."""


def size_of(task_name: str, preset: str) -> Size:
    """A preset on its data set and `GPUS` processes."""
    task, data = find(task_name), DATA[task_name]
    flags = ["--preset", preset, "--devices", str(GPUS), *data.flags]
    config: Any = parse(task.config, flags, "openwork train", "")
    with torch.device("meta"):
        net = task.architecture(config, Data((), (), info=data.info))
    weights = dict(net.named_parameters())
    method = build_method(config.method, config.method_options)
    sparse = ow.sparsify(net, config.pattern, method, exclude=config.exclude, remainder=config.remainder).sparse
    trained = {name: weight.numel() for name, weight in weights.items() if weight.requires_grad}
    return Size(
        steps=config.epochs * (data.samples // config.batch_size),
        batch=config.batch_size,
        optimizer=config.optimizer,
        all=sum(weight.numel() for weight in weights.values()),
        trained=sum(trained.values()),
        sparse=sum(weights[name].numel() for name in sparse),
        sparse_trained=sum(trained.get(name, 0) for name in sparse),
    )


def computed(sizes: dict[tuple[str, str], Size]) -> str:
    head = ["preset", "data set, samples", "batch", "steps", "weights", "sparse", "dense, MB", "sparse adds, MB"]
    lines = []
    for (task, preset), size in sizes.items():
        held, stepping = (f"{added / _MB:.0f}" for added in size.added_bytes)
        about = f"{DATA[task].name} {DATA[task].samples:,}"
        counts = [f"{size.batch}", f"{size.steps:,}", *(f"{count / 1e6:.1f} M" for count in (size.all, size.sparse))]
        lines.append([f"{task} `{preset}`", about, *counts, f"{size.dense_bytes / _MB:.0f}", f"{held}; {stepping}"])
    return table(head, lines)


def published(sizes: dict[tuple[str, str], Size]) -> str:
    head = ["preset", "published, dense", "memory a GPU", "ms a step", "hours of all steps", "MB a step for sparsity"]
    lines = []
    for (task, preset), size in sizes.items():
        for each in PUBLISHED[task]:
            hours = each.hours(size.steps, size.batch)
            step, traffic = f"{3.6e6 * hours / size.steps:.0f}", f"{size.traffic / _MB:.0f}"
            about = f"{each.what} ({each.source})"
            lines.append([f"{task} `{preset}`", about, each.memory, step, f"{hours:.1f}", traffic])
    return table(head, lines)


def commands() -> str:
    """The command line of each preset on one machine with `GPUS` GPUs."""
    lines = []
    for task, preset in RUNS:
        words = ["train", task, "--preset", preset, *DATA[task].flags, "--devices", str(GPUS), "--strategy", "ddp"]
        out = f"--out runs/{task}-{preset} --resume"
        lines += [f"torchrun --nproc-per-node {GPUS} -m openwork.cli \\", f"    {' '.join(words)} \\", f"    {out}"]
    return "\n".join(["```bash", *lines, "```"])


def section() -> str:
    sizes = {run: size_of(*run) for run in RUNS}
    parts = [commands(), _COMPUTED, computed(sizes), _PUBLISHED, published(sizes)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between(text, "<!-- at scale -->\n", section(), PAGE, "<!-- end at scale -->"), encoding="utf-8")


if __name__ == "__main__":
    main()
