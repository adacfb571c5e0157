"""Detection and segmentation from end to end on a slice, their scores, their pictures."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from openwork.recipes import find
from openwork.recipes.coco_metrics import Detections, average_precision, paste
from openwork.recipes.detector import drawn, sure, true_objects
from openwork.recipes.objects import shapes
from openwork.recipes.recipe import train
from openwork.recipes.rundir import read_lines
from openwork.recipes.weights import read_weights
from openwork.utils.torchvision_compat import ensure_torchvision

# --- scores --------------------------------------------------------------------------------------------------------


def truth(boxes, size=100):
    """One image per list of boxes, one class."""
    listed = [(i, box) for i, each in enumerate(boxes) for box in each]
    return {
        "images": [{"id": i, "width": size, "height": size} for i in range(len(boxes))],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, box) in enumerate(listed)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def found(boxes, scores):
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.ones(len(scores), int))


def test_average_precision_of_a_case_worked_out_by_hand():
    """Two objects. The best guess is right at every threshold, the second is wrong, the third overlaps by 0.6.

    At IoU 0.5, 0.55 and 0.6: precision 1 up to recall 1/2, then 2/3. Of the 101 recalls 0, 0.01, ..., 51 are at most
    1/2. At the seven higher thresholds the third is wrong: precision 1 up to recall 1/2, then nothing.
    """
    expected = truth([[[0, 0, 40, 40]], [[0, 0, 40, 40]]])
    guesses = [found([[0, 0, 40, 40], [60, 60, 20, 20]], [0.9, 0.8]), found([[0, 0, 40, 24]], [0.7])]
    score = average_precision(expected, guesses, "bbox")
    high, low = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert score["ap50"] == pytest.approx(high)
    assert score["ap75"] == pytest.approx(low)
    assert score["ap"] == pytest.approx((3 * high + 7 * low) / 10)


def test_nothing_found_scores_nothing():
    assert average_precision(truth([[[0, 0, 9, 9]]]), [found([], [])], "bbox") == {"ap": 0, "ap50": 0, "ap75": 0}


def test_a_mask_is_scored_by_its_pixels():
    """Three quarters of a square, in a box that is all of it: box AP 1; its mask counts up to IoU 0.75."""
    whole, part = np.zeros((2, 40, 40), np.uint8)
    whole[:20, :20], part[:20, :15] = 1, 1
    expected = truth([[[0, 0, 20, 20]]], 40)
    expected["annotations"][0]["segmentation"] = rle.encode(np.asfortranarray(whole))
    guess = replace(found([[0, 0, 20, 20]], [0.9]), masks=[rle.encode(np.asfortranarray(part))])
    assert average_precision(expected, [guess], "bbox")["ap"] == pytest.approx(1)
    score = average_precision(expected, [guess], "segm")
    assert score["ap"] == pytest.approx(6 / 10)
    assert score["ap75"] == pytest.approx(1)


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2])
def test_what_the_mask_head_is_taught_is_pasted_where_it_was(scale):
    """Masks cut as torchvision cuts them for training, pasted back at the file's size, cover the objects again."""
    ensure_torchvision()
    from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

    images = shapes(1, 12, 64 * scale, True, 0).val
    ours, theirs = [], []
    for index in range(12):
        _, target = images[index]
        file_masks = target["masks"].numpy().astype(bool)
        seen = torch.nn.functional.avg_pool2d(target["masks"].float(), scale)
        boxes = target["boxes"] / scale
        taught = project_masks_on_boxes(seen, boxes, torch.arange(len(boxes)), 28)
        size = (64 * scale, 64 * scale)
        again = np.stack(list(paste(taught, boxes, (64, 64), size)))
        other = paste_masks_in_image(taught[:, None], boxes * scale, size)[:, 0].numpy() > 0.5
        ours += [iou(a, b) for a, b in zip(again, file_masks, strict=True)]
        theirs += [iou(a, b) for a, b in zip(other, file_masks, strict=True)]
    assert np.mean(ours) > 0.93
    assert np.mean(ours) > np.mean(theirs) + 0.02


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_mask_that_reaches_over_the_edge_is_cut():
    (mask,) = paste(torch.ones(1, 28, 28), torch.tensor([[-5.0, 2, 4, 30]]), (10, 10), (20, 20))
    assert mask[6:, :8].all()
    assert not mask[:4].any()
    assert not mask[:, 10:].any()


# --- training ------------------------------------------------------------------------------------------------------

SMALL = {
    "image_size": 64,
    "max_size": 64,
    "anchors": [8, 12, 16, 24, 32],
    "rpn_post_nms_top_n": 30,
    "rois_per_image": 16,
    "limit": 40,
    "limit_val": 6,
    "epochs": 2,
    "validate_every": 2,
    "topology_every": 5,
    "log_every": 1,
    "progress": False,
    "threads": 1,
}


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def trained(request, tmp_path_factory):
    task = find(request.param)
    out = tmp_path_factory.mktemp(task.name) / "run"
    return task, out, train(task.config(**SMALL, lr=0.01, out=str(out)))


def test_training_learns_and_every_mask_is_exact(trained):
    task, out, result = trained
    losses = [each["train_loss"] for each in read_lines(out / "metrics.jsonl") if "train_loss" in each]
    assert len(losses) == result["steps"] == 20
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert result["density"] == 0.5
    weights = read_weights(out / "model.safetensors")
    sparse = [layer["name"] for layer in result["layers"] if layer["pattern"]]
    assert len(sparse) == (38 if task.name == "segmentation" else 34)
    for name in sparse:
        inputs_last = weights[name].movedim(0 if name.endswith("conv5_mask.weight") else 1, -1)
        assert int((inputs_last != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2


def test_the_scores_are_those_of_the_task(trained):
    task, out, result = trained
    assert all(0 <= result[metric.key] <= 1 for metric in task.metrics)
    validated = [each["epoch"] for each in read_lines(out / "metrics.jsonl") if task.metrics[0].key in each]
    assert validated == [1]  # --validate_every 2
    assert result["skipped"] == 0


def test_the_report_shows_the_samples_and_stays_small(trained):
    _, out, _ = trained
    pictures = json.loads((out / "visualizations.json").read_text())
    assert len(pictures) == 4
    assert len(json.dumps(pictures)) < 300_000
    page = re.sub(r"data:image/\w+;base64,[\s\w+/=]+", "DATA", (out / "report.html").read_text())
    assert page.count('<img src="DATA"') == 8
    assert not re.search(r"https?:|//|<script|<link|<img src=\"(?!DATA)|@import|url\((?!#)", page.replace("</", "<"))
    assert "validation image 1" in page


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    """Two micro-batches a step, four steps: killed in the third, after the checkpoint before it."""
    name = "segmentation"  # all that detection does, and masks
    config = {**SMALL, "limit": 8, "limit_val": 2, "accumulate": 2, "checkpoint_every": 2, "warmup": 0.5}
    script = Path(__file__).with_name("run_and_kill.py")

    def run(out, kill_after, resume=False):
        text = json.dumps({**config, "out": str(out), "resume": resume})
        return subprocess.run([sys.executable, script, name, text, str(kill_after)], check=False).returncode

    train(find(name).config(**config, out=str(tmp_path / "whole")))
    assert run(tmp_path / "run", kill_after=5) == -signal.SIGKILL
    assert run(tmp_path / "run", kill_after=0, resume=True) == 0
    whole, again = (read_weights(tmp_path / each / "model.safetensors") for each in ("whole", "run"))
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


# --- pictures ------------------------------------------------------------------------------------------------------


def test_boxes_masks_and_names_are_drawn():
    """A pixel of the file is half of one that is shown. A colour for each class, or for each object of one class."""
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    size = torch.tensor([120, 160])
    mask = np.zeros((120, 160), np.uint8)
    mask[60:, 80:] = 1

    def pixels(count, classes, masks=()):
        boxes = np.array([[10.0, 10, 40, 30]] * count)
        view = drawn(image, Detections(boxes, np.full(count, 0.75), np.ones(count, int), masks), size, classes)
        assert view.caption == ("1 object" if count == 1 else f"{count} objects")
        data = base64.b64decode(view.image.removeprefix("data:image/jpeg;base64,"))
        return np.asarray(Image.open(io.BytesIO(data))).astype(int).sum(-1)

    assert pixels(0, ["cat"]).max() < 30
    boxed, named = pixels(1, ["cat"]), pixels(1, ["cat", "cup"])
    assert boxed.shape == (240, 320)  # four times as large as the network saw it, twice the file
    assert boxed[20, 30:90].min() > 150  # the upper edge of the box
    assert boxed[20, 110:].max() < 60
    assert (named > 150).sum() > (boxed > 150).sum()  # the name of the class
    assert (pixels(21, ["cat", "cup"]) > 150).sum() < (named > 150).sum()  # a crowd has none
    shaded = pixels(1, ["cat"], [rle.encode(np.asfortranarray(mask))])
    assert shaded[130:, 170:].min() > 60 > shaded[130:, :150].max()


def test_what_is_sure_and_what_is_true():
    found = Detections(np.arange(8.0).reshape(2, 4), np.array([0.9, 0.4]), np.array([1, 2]), masks=[{"a": 1}, {"b": 2}])
    best = sure(found)
    assert (best.boxes_N4.tolist(), best.labels_N.tolist(), best.masks) == ([[0, 1, 2, 3]], [1], [{"a": 1}])
    true = true_objects(truth([[], [[1, 2, 3, 4]]]), 1)
    assert (true.boxes_N4.tolist(), true.labels_N.tolist(), len(true.masks)) == ([[1, 2, 3, 4]], [1], 0)
    assert true_objects(truth([[], [[1, 2, 3, 4]]]), 0).boxes_N4.shape == (0, 4)
