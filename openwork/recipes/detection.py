"""`openwork train detection`: boxes around objects, by Faster R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from openwork.recipes import coco
from openwork.recipes.coco_metrics import Detections, average_precision
from openwork.recipes.config import DataSource, data_flag, default
from openwork.recipes.data import Data
from openwork.recipes.detector import USUAL, DetectorConfig, DetectorTask
from openwork.recipes.task import percent


@dataclass(frozen=True)
class DetectionConfig(DetectorConfig):
    """Defaults: a tiny network for generated images. The presets are the usual recipe of Faster R-CNN on COCO."""

    task: ClassVar[str] = "detection"
    sources: ClassVar[Sequence[DataSource]] = (
        DataSource("shapes"),
        DataSource("bccd", coco.LAYOUT),
        DataSource("coco", coco.LAYOUT),
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = USUAL

    data: str = data_flag(sources)
    out: str = default("out", "runs/detection")


class Detection(DetectorTask):
    name = "detection"
    config = DetectionConfig
    metrics = (percent("val_ap", "AP"), percent("val_ap50", "AP50"), percent("val_ap75", "AP75"))
    masks = False

    def compute_metrics(self, predictions: Sequence[Detections], data: Data) -> dict[str, float]:
        return {f"val_{key}": value for key, value in average_precision(data.info.truth, predictions, "bbox").items()}


TASK = Detection()
