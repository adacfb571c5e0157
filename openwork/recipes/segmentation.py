"""`openwork train segmentation`: a mask for each object, by Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from openwork.recipes import coco
from openwork.recipes.coco_metrics import Detections, average_precision
from openwork.recipes.config import DataSource, data_flag, default, flag
from openwork.recipes.data import Data
from openwork.recipes.detector import USUAL, DetectorConfig, DetectorTask
from openwork.recipes.task import percent


@dataclass(frozen=True)
class SegmentationConfig(DetectorConfig):
    """Defaults: a tiny network for generated images. The presets are the usual recipe of Mask R-CNN on COCO."""

    task: ClassVar[str] = "segmentation"
    sources: ClassVar[Sequence[DataSource]] = (
        DataSource("shapes"),
        DataSource("dsb2018", coco.LAYOUT),
        DataSource("coco", coco.LAYOUT),
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {name: {**usual, "mask_convs": 4} for name, usual in USUAL.items()}

    data: str = data_flag(sources)
    mask_convs: int = flag(2, "convolutions of the mask head before its transposed one")
    out: str = default("out", "runs/segmentation")

    def check(self) -> None:
        DetectorConfig.check(self)
        if self.mask_convs < 1:
            raise ValueError(f"mask_convs is {self.mask_convs}; the mask head needs at least 1")


class Segmentation(DetectorTask):
    name = "segmentation"
    config = SegmentationConfig
    metrics = (
        percent("val_mask_ap", "mask AP"),
        percent("val_mask_ap50", "mask AP50"),
        percent("val_box_ap", "box AP"),
        percent("val_box_ap50", "box AP50"),
    )
    masks = True

    def compute_metrics(self, predictions: Sequence[Detections], data: Data) -> dict[str, float]:
        scores: dict[str, float] = {}
        for what, kind in (("mask", "segm"), ("box", "bbox")):
            computed = average_precision(data.info.truth, predictions, kind)
            scores |= {f"val_{what}_{key}": computed[key] for key in ("ap", "ap50")}
        return scores


TASK = Segmentation()
