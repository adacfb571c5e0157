"""What a task adds to the recipe that all share: its data, its network, its loss and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openwork.recipes.config import Config
from openwork.recipes.data import Data


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

    def full_text(self, value: float | None) -> str:
        return f"{self.label} {self.text(value)} {self.unit}".strip()


def percent(key: str, label: str) -> Metric:
    return Metric(key, label, "%", 100)


@dataclass(frozen=True)
class View:
    """A part of a sample in the report: an image as a data: URI, or text in runs, each of which may be marked."""

    caption: str
    image: str = ""
    text: Sequence[tuple[str, bool]] = ()


@dataclass(frozen=True)
class Visualization:
    """One validation sample in the report: what is right, with the input, and what the network says."""

    name: str
    truth: Sequence[View]
    predicted: Sequence[View]


class Task(ABC):
    """One of `openwork train TASK`. Subclasses are without state: everything is in the arguments."""

    name: ClassVar[str]
    config: ClassVar[type[Config]]
    metrics: ClassVar[Sequence[Metric]]  # the first one is compared and tested
    eval_batch: ClassVar[int] = 256  # samples

    @abstractmethod
    def load_data(self, config: Any) -> Data:
        """The samples that `config.data` names."""

    @abstractmethod
    def build(self, config: Any, data: Data) -> nn.Module:
        """The network with its initial weights, from torch's current seed."""

    def architecture(self, config: Any, data: Data) -> nn.Module:
        """The network for weights that are read afterwards: `build`, unless that reads files for its initial ones."""
        return self.build(config, data)

    @abstractmethod
    def example(self, data: Data) -> Any:
        """One input of the network, as `ow.sparsify` takes it to count multiply-adds."""

    @abstractmethod
    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a training batch, with gradients."""

    @abstractmethod
    def predictions(self, net: nn.Module, batch: Any) -> list[Any]:
        """What `compute_metrics` needs of each sample of a validation batch: a small thing per sample, on the CPU."""

    @abstractmethod
    def compute_metrics(self, predictions: Sequence[Any], data: Data) -> dict[str, float]:
        """The metrics, and `val_loss` where there is one, from the predictions of all validation samples in order."""

    def before_last_validation(self, config: Any, net: nn.Module) -> None:  # noqa: B027 - few tasks need it
        """Settings for the validation of the finalized network: what is too slow for that of every epoch."""

    def save_artifacts(self, data: Data, folder: Path) -> None:  # noqa: B027 - few tasks need it
        """Writes into the run directory what the weights are useless without, such as a vocabulary."""

    def network_facts(self, data: Data) -> dict[str, Any]:
        """What the network takes from the data and no file of its own holds, in JSON's types: it goes into the run
        directory, so that the network can be built where the data is not there. `classes` and `names` are compared."""
        return {}

    def stand_in(self, config: Any, facts: Mapping[str, Any]) -> Data | None:
        """A sample for each part, made here in the form of a run's, with its `info`, from its directory (`config.out`)
        and `facts` (its `network_facts`). None where they are too few; ValueError where they are wrong."""
        return None

    def notes(self, config: Any, data: Data) -> dict[str, str]:
        """What a reader of the metrics must know besides, for the report: how they were computed, what was left out."""
        return {}

    def optimizer(self, config: Any, net: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(config, net)

    def config_of(self, weights: Path, config: Any) -> Any:
        """The configuration of a network whose weights are given, but not by a run that has its own."""
        return config

    def visualizations(self, config: Any, net: nn.Module, data: Data) -> list[Visualization]:
        """A few validation samples for the report."""
        return []


class DistillableTask(Task):
    """A task whose network can learn from the outputs of another one as well: `--teacher`."""

    @abstractmethod
    def outputs(self, net: nn.Module, batch: Any) -> Any:
        """What the network says of a training batch."""

    @abstractmethod
    def loss_of(self, net: nn.Module, outputs: Any, batch: Any) -> Tensor:
        """`loss`, of outputs that are there already."""

    @abstractmethod
    def distance(self, net: nn.Module, outputs: Any, taught: Any, batch: Any) -> Tensor:
        """The mean distance of the outputs from those of the teacher, with gradients."""

    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        return self.loss_of(net, self.outputs(net, batch), batch)

    def taught_loss(self, net: nn.Module, teacher: nn.Module, batch: Any, weight: float) -> Tensor:
        """`loss`, with a share of `weight` replaced by the distance from the teacher, which keeps no gradients."""
        with torch.no_grad():
            taught = self.outputs(teacher, batch)
        outputs = self.outputs(net, batch)
        distance = self.distance(net, outputs, taught, batch)
        return weight * distance + (1 - weight) * self.loss_of(net, outputs, batch)


def build_optimizer(config: Config, net: nn.Module) -> torch.optim.Optimizer:
    """What --optimizer names, over all parameters that want gradients."""
    weights = [p for p in net.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    first, second = config.betas
    return cls(weights, lr=config.lr, betas=(first, second), eps=config.eps, weight_decay=config.weight_decay)


def description_of(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """The metrics as result.json holds them, so that a report needs no task's libraries."""
    return [asdict(metric) for metric in metrics]
