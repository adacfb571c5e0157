"""`openwork train classification`: images into classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import openwork as ow
from openwork.recipes import images
from openwork.recipes.config import Config, DataSource, data_flag, default, flag, rates, source_of
from openwork.recipes.data import Data
from openwork.recipes.models import build_model
from openwork.recipes.stored_result import check_facts
from openwork.recipes.task import DistillableTask, percent
from openwork.utils.counted import counted


@dataclass(frozen=True)
class ClassificationConfig(Config):
    """Defaults: the SR-STE authors' ImageNet recipe (SGD, momentum 0.9, weight decay 5e-5 on everything, linear
    warm-up, cosine to zero per step, decay 2e-4; github.com/aojunzz/NM-sparsity, classification/configs) scaled to
    the digits.
    """

    task: ClassVar[str] = "classification"
    sources: ClassVar[Sequence[DataSource]] = (
        DataSource("digits"),
        DataSource("fashion-mnist", images.FASHION),
        DataSource("cifar10", "cifar-10-batches-py with data_batch_1 to data_batch_5 and test_batch"),
        DataSource("imagefolder", "train/CLASS/*.jpg and val/CLASS/*.jpg"),
    )
    usual: ClassVar[dict[str, Any]] = {"batch_size": 64, "lr": rates(), "warmup": 1.0}
    # arXiv:2102.04010 and its code: 120 epochs, batch 256, all convolutions sparse, the last layer dense.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
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

    data: str = data_flag(sources)
    model: str = flag("resnet8", "resnet8, resnet20, ... (small images), any torchvision name, timm/NAME")
    dropout: float = flag(0.0, "before the last layer (resnet8, resnet20, ...)")
    width: int = flag(0, "channels of the first stage (resnet8, resnet20, ...; 0: 16)")
    image_size: int = flag(224, "side of the images (imagefolder)")
    hold_out: int = flag(0, "validate on so many training samples, left out of training: to choose options by")
    out: str = default("out", "runs/classification")


class Classification(DistillableTask):
    name = "classification"
    config = ClassificationConfig
    metrics = (percent("val_accuracy", "accuracy"), percent("val_top5", "top-5"))

    def load_data(self, config: ClassificationConfig) -> Data:
        source, folder = source_of(config)
        limits = {"limit": config.limit, "limit_val": config.limit_val, "hold_out": config.hold_out}
        if folder is None:
            return images.digits(**limits)
        if source == "cifar10":  # whose files torchvision knows by their checksums
            return images.cifar10(folder, **limits)
        if source == "imagefolder":
            how: dict[str, Any] = {"skip_bad": config.skip_bad, "follow_links": config.follow_links, **limits}
            return images.imagefolder(folder, config.image_size, config.workers, **how)
        return images.fashion_mnist(folder, **limits, follow_links=config.follow_links)

    def notes(self, config: ClassificationConfig, data: Data) -> dict[str, str]:
        held = counted(data.val_count, "training sample that was", "training samples that were")
        held += " left out of training (--hold_out)"
        return {"validation samples": held} if config.hold_out else {}

    def build(self, config: ClassificationConfig, data: Data) -> nn.Module:
        shape = {"classes": data.info.classes, "channels": data.info.channels}
        return build_model(config.model, **shape, dropout=config.dropout, width=config.width)

    def network_facts(self, data: Data) -> dict[str, Any]:
        size = list(self.example(data).shape[2:])
        names = {"names": list(data.info.names)} if data.info.names else {}
        return {"classes": data.info.classes, "channels": data.info.channels, "size": size, **names}

    def stand_in(self, config: ClassificationConfig, facts: Mapping[str, Any]) -> Data | None:
        """Noise."""
        if not facts:
            return None
        check_facts(config.out, facts, {"classes": (int,), "channels": (int,), "size": [(int,)]})
        return images.noise(facts["classes"], facts["channels"], facts["size"], facts.get("names", ()))

    def example(self, data: Data) -> Tensor:
        ((pixels, _),) = data.val_batches([np.array([0])])
        return pixels

    def outputs(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return net(batch[0])

    def loss_of(self, net: nn.Module, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def distance(self, net: nn.Module, outputs: Tensor, taught: Tensor, batch: Any) -> Tensor:
        return ow.distillation_loss(outputs, taught)

    def predictions(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Any]:
        """Loss, whether the best guess is right, whether one of the best five is."""
        pixels, labels = batch
        logits = net(pixels).float()
        guesses = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none")
        return list(torch.stack([losses, guesses[:, 0], guesses.any(1)], dim=1).double().cpu().numpy())

    def compute_metrics(self, predictions: Sequence[Any], data: Data) -> dict[str, float]:
        loss, first, five = (sum(column) / len(predictions) for column in zip(*predictions, strict=True))
        return {"val_loss": float(loss), "val_accuracy": float(first), "val_top5": float(five)}


TASK = Classification()
