"""`openwork train detection`: boxes around objects, by Faster R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from openwork.recipes import coco
from openwork.recipes.cocoscore import Found, average_precision
from openwork.recipes.config import Source, default, flag_of
from openwork.recipes.detector import USUAL, DetectorConfig, DetectorTask
from openwork.recipes.objects import ObjectData
from openwork.recipes.task import percent


@dataclass(frozen=True)
class DetectionConfig(DetectorConfig):
    """Defaults: a tiny network for generated images. The presets are the usual recipe of Faster R-CNN on COCO."""

    task: ClassVar[str] = "detection"
    sources: ClassVar[Sequence[Source]] = (
        Source("shapes"),
        Source("bccd", coco.LAYOUT),
        Source("coco", coco.LAYOUT),
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = USUAL

    data: str = flag_of(sources)
    out: str = default("out", "runs/detection")


class Detection(DetectorTask):
    name = "detection"
    config = DetectionConfig
    metrics = (percent("val_ap", "AP"), percent("val_ap50", "AP50"), percent("val_ap75", "AP75"))
    masks = False

    def score(self, records: Sequence[Found], data: ObjectData) -> dict[str, float]:
        return {f"val_{key}": value for key, value in average_precision(data.truth, records, "bbox").items()}


TASK = Detection()
