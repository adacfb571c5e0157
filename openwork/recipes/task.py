"""What a task adds to the recipe that all share: its data, its network, its loss and its score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.recipes.config import Config


@dataclass(frozen=True)
class Metric:
    """One number of a validation, `key` in result.json and metrics.jsonl, and how tables and charts show it."""

    key: str
    label: str
    unit: str = ""
    scale: float = 1  # 100 where a share is shown in percent
    digits: int = 2
    higher_is_better: bool = True

    @property
    def heading(self) -> str:
        return f"{self.label} {self.unit}".strip()

    def text(self, value: float | None, sign: str = "") -> str:
        """The value in the metric's unit, without naming it; "-" for None."""
        return "-" if value is None else format(self.scale * value, f"{sign}.{self.digits}f")

    def full_text(self, value: float) -> str:
        return f"{self.label} {self.text(value)} {self.unit}".strip()


def percent(key: str, label: str) -> Metric:
    return Metric(key, label, "%", 100)


@dataclass(frozen=True)
class Picture:
    """One validation sample in the report. HTML: what is right (with the input), and what the network says."""

    name: str
    truth: str
    predicted: str


class Data(Protocol):
    """Samples by number. What a batch holds is between the data and its task; tensors in it go to the device."""

    @property
    def train_count(self) -> int: ...

    @property
    def val_count(self) -> int: ...

    @property
    def skipped(self) -> int:
        """Samples that --skip-bad left out."""
        ...

    def train_batches(self, batches: Sequence[np.ndarray], seed: int, epoch: int) -> Iterator[Any]:
        """One batch per index array. Augmentation is a function of (seed, epoch, index), so that a run can resume."""
        ...

    def val_batches(self, batches: Sequence[np.ndarray]) -> Iterator[Any]: ...


class Task(ABC):
    """One of `openwork train TASK`. Subclasses are without state: everything is in the arguments."""

    name: ClassVar[str]
    config: ClassVar[type[Config]]
    metrics: ClassVar[Sequence[Metric]]  # the first one is compared and tested
    eval_batch: ClassVar[int] = 256  # samples

    @abstractmethod
    def load_data(self, config: Any) -> Any:
        """The `Data` that `config.data` names."""

    @abstractmethod
    def build(self, config: Any, data: Any) -> nn.Module:
        """The network with its initial weights, from torch's current seed."""

    @abstractmethod
    def example(self, data: Any) -> Any:
        """One input of the network, as `ow.sparsify` takes it to count multiply-adds."""

    @abstractmethod
    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a training batch, with gradients."""

    @abstractmethod
    def records(self, net: nn.Module, batch: Any) -> list[Any]:
        """What `score` needs of each sample of a validation batch: one small thing per sample, on the CPU."""

    @abstractmethod
    def score(self, records: Sequence[Any], data: Any) -> dict[str, float]:
        """The metrics, and `val_loss` where there is one, from the records of all validation samples in order."""

    def sizes(self, data: Any) -> np.ndarray | None:
        """A size per training sample, where a batch shall hold samples of like size, so that little is padded."""
        return None

    def before_last_validation(self, config: Any, net: nn.Module) -> None:  # noqa: B027 - few tasks need it
        """Settings for the validation of the finalized network: what is too slow for that of every epoch."""

    def keep(self, data: Any, folder: Path) -> None:  # noqa: B027 - few tasks need it
        """Writes into the run directory what the weights are useless without, such as a vocabulary."""

    def notes(self, config: Any, data: Any) -> dict[str, str]:
        """What a reader of the scores must know besides, for the report: how they were computed, what was left out."""
        return {}

    def optimizer(self, config: Any, net: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(config, net)

    def pictures(self, config: Any, net: nn.Module, data: Any) -> list[Picture]:
        """A few validation samples for the report."""
        return []


def build_optimizer(config: Config, net: nn.Module) -> torch.optim.Optimizer:
    """What --optimizer names, over all parameters that want gradients."""
    weights = [p for p in net.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    first, second = config.betas
    return cls(weights, lr=config.lr, betas=(first, second), eps=config.eps, weight_decay=config.weight_decay)


def build_method(config: Config) -> Any:
    makers: dict[str, Any] = {
        "dense": ow.Dense,
        "asp": ow.ASP,
        "ste": ow.STE,
        "sr-ste": lambda: ow.SRSTE(decay=config.decay),
        "transposable-sr-ste": lambda: ow.TransposableSRSTE(config.decay, config.refresh_every),
    }
    return makers[config.method]()


def described(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The metrics as result.json holds them, so that a report needs no task's libraries."""
    return [asdict(metric) for metric in metrics]
