"""The two operators against brute force, and torchvision made to import with them."""

from __future__ import annotations

import doctest
import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from openwork.utils import torchvision_ops
from openwork.utils.torchvision_compat import ensure_torchvision, prepare_torchvision
from openwork.utils.torchvision_ops import nms, roi_align

# --- nms ---------------------------------------------------------------------------------------------------------


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union else math.nan


def slow_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[int]:
    by_score = sorted(range(len(boxes)), key=lambda i: -scores[i].item())  # stable: ties in index order
    kept: list[int] = []
    for i in by_score:
        if not any(slow_iou(boxes[k].tolist(), boxes[i].tolist()) > iou_threshold for k in kept):
            kept.append(i)
    return kept


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Boxes on a grid of whole numbers, so that many overlap, some coincide and some have no area: (count, 4)."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (count, 2), generator=generator)
    size = torch.randint(0, 8, (count, 2), generator=generator)
    return torch.cat([corner, corner + size], dim=1).to(dtype)


@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_nms_is_brute_force(seed: int, iou_threshold: float) -> None:
    boxes = random_boxes(60, seed)
    scores = torch.rand(60, generator=torch.Generator().manual_seed(seed))
    assert nms(boxes, scores, iou_threshold).tolist() == slow_nms(boxes, scores, iou_threshold)


def test_nms_keeps_the_lower_index_of_equal_scores() -> None:
    boxes = random_boxes(60, seed=7)
    scores = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(7)).float()
    assert nms(boxes, scores, 0.4).tolist() == slow_nms(boxes, scores, 0.4)


def test_nms_keeps_boxes_that_overlap_exactly_by_the_threshold() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])  # IoU is one half
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]


def test_nms_of_nothing_is_nothing() -> None:
    kept = nms(torch.empty(0, 4), torch.empty(0), 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nms_takes_every_floating_dtype(dtype: torch.dtype) -> None:
    boxes, scores = random_boxes(30, seed=3), torch.linspace(1, 0, 30)
    assert nms(boxes.to(dtype), scores.to(dtype), 0.5).tolist() == slow_nms(boxes, scores.to(dtype), 0.5)


def test_batched_nms_of_torchvision_keeps_classes_apart() -> None:
    torchvision = ensure_torchvision()
    boxes, scores = random_boxes(80, seed=11, dtype=torch.float32), torch.linspace(0.1, 0.9, 80)
    classes = torch.arange(80) % 3
    members = [(classes == c).nonzero().squeeze(1) for c in range(3)]
    kept = {int(m[i]) for m in members for i in slow_nms(boxes[m], scores[m], 0.5)}
    expected = sorted(kept, key=lambda i: -scores[i].item())
    assert torchvision.ops.batched_nms(boxes, scores, classes, 0.5).tolist() == expected


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(torchvision_ops).failed == 0


# --- roi_align ---------------------------------------------------------------------------------------------------


def slow_sample(plane: Tensor, y: float, x: float) -> float:
    """Bilinear, the border's value up to one pixel outside, 0 beyond: (H, W) -> number."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return float(upper * (1 - (y - top)) + lower * (y - top))


def slow_bin(plane: Tensor, top: float, left: float, height: float, width: float, sampling_ratio: int) -> float:
    """Mean over the sample grid of one bin."""
    rows = sampling_ratio if sampling_ratio > 0 else math.ceil(height)
    columns = sampling_ratio if sampling_ratio > 0 else math.ceil(width)
    samples = [
        slow_sample(plane, top + (i + 0.5) * height / rows, left + (j + 0.5) * width / columns)
        for i in range(rows)
        for j in range(columns)
    ]
    return sum(samples) / max(len(samples), 1)


def slow_roi_align(
    features: Tensor, rois: Tensor, scale: float, bins: tuple[int, int], sampling_ratio: int, aligned: bool
) -> Tensor:
    out = features.new_zeros(len(rois), features.shape[1], *bins)
    for k, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0.0) for c in corners)
        height, width = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
        height, width = height / bins[0], width / bins[1]
        for c in range(features.shape[1]):
            for p in range(bins[0]):
                for q in range(bins[1]):
                    plane, corner = features[int(image), c], (y1 + p * height, x1 + q * width)
                    out[k, c, p, q] = slow_bin(plane, *corner, height, width, sampling_ratio)
    return out


def example_features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 2, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# Inside, over each border, wholly outside, smaller than a pixel, without area, and not in the order of the images.
ROIS = torch.tensor(
    [
        [1, 2.0, 1.0, 13.0, 9.0],
        [0, -7.0, -5.0, 6.0, 4.0],
        [1, 9.0, 4.0, 24.0, 18.0],
        [0, 40.0, 40.0, 50.0, 50.0],
        [0, 3.1, 2.7, 3.4, 3.3],
        [1, 4.0, 4.0, 4.0, 4.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("bins", [(3, 2), (1, 1)])
@pytest.mark.parametrize("sampling_ratio", [2, -1])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_brute_force(aligned: bool, sampling_ratio: int, bins: tuple[int, int]) -> None:
    features = example_features()
    expected = slow_roi_align(features, ROIS, 0.5, bins, sampling_ratio, aligned)
    torch.testing.assert_close(roi_align(features, ROIS, 0.5, *bins, sampling_ratio, aligned), expected)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_roi_align_of_torchvision_is_brute_force(sampling_ratio: int) -> None:
    torchvision = ensure_torchvision()
    features = example_features()
    out = torchvision.ops.roi_align(features, ROIS, (3, 2), 0.5, sampling_ratio, aligned=True)
    torch.testing.assert_close(out, slow_roi_align(features, ROIS, 0.5, (3, 2), sampling_ratio, aligned=True))


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_roi_align_of_no_boxes_is_empty_and_trains(sampling_ratio: int) -> None:
    features = example_features().requires_grad_()
    out = roi_align(features, torch.empty(0, 5, dtype=torch.float64), 0.5, 3, 2, sampling_ratio, False)
    assert out.shape == (0, 2, 3, 2)
    out.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_roi_align_gradient(sampling_ratio: int) -> None:
    features = example_features()[:, :1, :4, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: roi_align(f, ROIS[:3], 0.4, 2, 2, sampling_ratio, True), (features,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_sums_half_precision_in_float32(dtype: torch.dtype) -> None:
    features = example_features(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = roi_align(features, ROIS.to(dtype), 0.5, 3, 2, 2, False)
    exact = roi_align(features.float(), ROIS.to(dtype).float(), 0.5, 3, 2, 2, False)
    torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0)


def test_roi_align_passes_nan_boxes_on() -> None:
    rois = ROIS[:1].clone()
    rois[0, 1] = math.nan
    assert roi_align(example_features(), rois, 0.5, 3, 2, 2, False).isnan().all()


# --- the import --------------------------------------------------------------------------------------------------


def test_ensure_torchvision_is_idempotent() -> None:
    assert ensure_torchvision() is ensure_torchvision() is sys.modules["torchvision"]


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ensure_torchvision_repairs_a_failed_import() -> None:
    """In a fresh process: a plain import, which fails or not by environment; then two calls; then a model runs."""
    run("""
import contextlib, torch
with contextlib.suppress(RuntimeError):
    import torchvision
from openwork.utils.torchvision_compat import ensure_torchvision
assert ensure_torchvision() is ensure_torchvision()
import torchvision
assert torchvision.extension._has_ops()
assert torchvision.models.resnet18(num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
assert torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]
""")


@pytest.mark.parametrize(
    "lines",
    [
        "from openwork.integrations.lightning import SparseCallback",
        "from openwork.integrations.hf_trainer import SparseCallback",
        "from openwork.integrations.hf_accelerate import SparseRun",
        "import openwork.recipes, timm, torchmetrics.detection",
        """
import contextlib
with contextlib.suppress(RuntimeError):
    import torchvision
from openwork.integrations.lightning import SparseCallback
""",
    ],
)
def test_what_needs_torchvision_imports_without_a_word_from_the_user(lines: str) -> None:
    for package in ("lightning", "transformers", "accelerate", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    run(lines)


def test_preparing_does_not_import_torchvision() -> None:
    assert run("import sys, openwork.integrations, openwork.recipes; print('torchvision' in sys.modules)") == "False\n"


def test_missing_torchvision_is_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what `import` reads as "there is no such module"
    prepare_torchvision()
    with pytest.raises(ImportError, match=r"pip install 'openwork\[train\]'"):
        ensure_torchvision()
