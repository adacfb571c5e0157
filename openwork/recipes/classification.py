"""`openwork train classification`: images into classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.recipes import datasets
from openwork.recipes.config import Config, Source, default, flag, flag_of, source_of
from openwork.recipes.imagefolder import imagefolder
from openwork.recipes.models import build_model
from openwork.recipes.task import Task, percent


@dataclass(frozen=True)
class ClassificationConfig(Config):
    """Defaults: the SR-STE authors' ImageNet recipe (SGD, momentum 0.9, weight decay 5e-5 on everything, linear
    warm-up, cosine to zero per step, decay 2e-4; github.com/aojunzz/NM-sparsity, classification/configs) scaled to
    the digits.
    """

    task: ClassVar[str] = "classification"
    sources: ClassVar[Sequence[Source]] = (
        Source("digits"),
        Source(
            "fashion-mnist",
            "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files",
        ),
        Source("cifar10", "data_batch_1 to data_batch_5 and test_batch, as python or .bin files"),
        Source("imagefolder", "train/CLASS/*.jpg and val/CLASS/*.jpg"),
    )
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

    data: str = flag_of(sources)
    model: str = flag("resnet8", "resnet8, resnet20, ... (small images), any torchvision name, timm/NAME")
    dropout: float = flag(0.0, "before the last layer (resnet8, resnet20, ...)")
    image_size: int = flag(224, "side of the images (imagefolder)")
    out: str = default("out", "runs/classification")


class Classification(Task):
    name = "classification"
    config = ClassificationConfig
    metrics = (percent("val_accuracy", "accuracy"), percent("val_top5", "top-5"))

    def load_data(self, config: ClassificationConfig) -> Any:
        source, folder = source_of(config)
        if folder is None:
            return datasets.digits().limited(config.limit, config.limit_val)
        if source == "imagefolder":
            found: Any = imagefolder(folder, config.image_size, config.workers, config.skip_bad)
        else:
            found = {"fashion-mnist": datasets.fashion_mnist, "cifar10": datasets.cifar10}[source](folder)
        return found.limited(config.limit, config.limit_val)

    def build(self, config: ClassificationConfig, data: Any) -> nn.Module:
        return build_model(config.model, classes=data.classes, channels=data.shape[0], dropout=config.dropout)

    def example(self, data: Any) -> Tensor:
        ((images, _),) = data.val_batches([np.array([0])])
        return images

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(net(images), labels)

    def records(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Any]:
        """Loss, whether the best guess is right, whether one of the best five is."""
        images, labels = batch
        logits = net(images).float()
        guesses = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none")
        return list(torch.stack([losses, guesses[:, 0], guesses.any(1)], dim=1).double().cpu().numpy())

    def score(self, records: Sequence[Any], data: Any) -> dict[str, float]:
        loss, first, five = (sum(column) / len(records) for column in zip(*records, strict=True))
        return {"val_loss": float(loss), "val_accuracy": float(first), "val_top5": float(five)}


TASK = Classification()
