"""torchvision's `nms` and `roi_align` in plain torch, for where its compiled operators do not load.

Shapes: N images, C channels, H x W pixels, K boxes, P x Q bins, S samples per bin along one axis.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    # Never called here, but torchvision registers a fake kernel for it at import.
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    """roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,
    int sampling_ratio, bool aligned) -> Tensor""",
)

_BLOCK = 128  # boxes whose overlaps with all later ones are computed at once


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better kept box overlaps by more than `iou_threshold`, best score first.

    boxes (K, 4) as x1, y1, x2, y2; scores (K,); returns int64 (kept,). Equal scores: the lower index comes first.

    >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [8, 8, 9, 9]])
    >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
    tensor([1, 2])
    """
    order_K = scores.argsort(descending=True, stable=True)
    precise = torch.promote_types(boxes.dtype, torch.float32)
    # numpy, because the loop is sequential: a torch call costs several times more than the few numbers it works on.
    boxes_4K = boxes.detach().to(precise)[order_K].T.cpu().numpy()
    kept_K = torch.from_numpy(_greedy(np.ascontiguousarray(boxes_4K), iou_threshold))
    return order_K[kept_K.to(boxes.device)]


def _greedy(boxes_4K: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Which columns survive when each survivor removes the later ones that overlap it too much: (4, K) -> bool (K,)."""
    kept_K = np.ones(boxes_4K.shape[1], dtype=bool)
    # Typed, so that numpy compares float32 overlaps in float64, as torchvision's kernel does.
    threshold = np.float64(iou_threshold)
    with np.errstate(invalid="ignore"):  # boxes without area have IoU 0/0, which is not above any threshold
        for start in range(0, len(kept_K), _BLOCK):
            rows_R = start + kept_K[start : start + _BLOCK].nonzero()[0]
            hides_RJ = _iou(boxes_4K[:, rows_R, None], boxes_4K[:, None, start:]) > threshold
            for row, hides_J in zip(rows_R, hides_RJ, strict=True):
                if kept_K[row]:
                    kept_K[row + 1 :] &= ~hides_J[row + 1 - start :]
    return kept_K


def _iou(a_4K: np.ndarray, b_4K: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes in columns: (4, K), (4, K) -> (K,), or any shapes that broadcast."""
    common_2K = (np.minimum(a_4K[2:], b_4K[2:]) - np.maximum(a_4K[:2], b_4K[:2])).clip(min=0)
    common_K = common_2K[0] * common_2K[1]
    return common_K / (_area(a_4K) + _area(b_4K) - common_K)


def _area(boxes_4K: np.ndarray) -> np.ndarray:
    width_K, height_K = boxes_4K[2:] - boxes_4K[:2]
    return width_K * height_K


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Mean of bilinear samples in each bin of each box (Mask R-CNN, arXiv:1703.06870): -> (K, C, P, Q).

    features (N, C, H, W); rois (K, 5) as image, x1, y1, x2, y2, which times `spatial_scale` are pixels of `features`.
    `sampling_ratio` samples per bin and axis, or as many as the bin has pixels where it is not positive.
    Differentiable in features alone. `aligned` puts pixel centres at .5 and lets boxes be smaller than a pixel.

    A bilinear sample is a weighted sum over rows of weighted sums over columns, and so is a mean over a grid of them:
    the whole is two matrix products, at a cost of K*C*P*W*(H + Q) multiply-adds. That suits maps up to 100 x 100.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    image_K = rois[:, 0].long()
    x1_K, y1_K, x2_K, y2_K = (rois[:, 1:].detach().to(precise) * spatial_scale - aligned / 2).unbind(1)
    smallest = -torch.inf if aligned else 1.0
    height_K, width_K = (y2_K - y1_K).clamp(min=smallest), (x2_K - x1_K).clamp(min=smallest)
    # Half precision would round positions and sums; torchvision's own kernel leaves autocast here too.
    with torch.autocast(features.device.type, enabled=False):
        rows_KPH = _bin_weights(y1_K, height_K, pooled_height, features.shape[2], sampling_ratio)
        columns_KQW = _bin_weights(x1_K, width_K, pooled_width, features.shape[3], sampling_ratio)
        pooled = _pool(features.to(precise), image_K, rows_KPH, columns_KQW)
    return pooled.to(features.dtype)


def _bin_weights(start_K: Tensor, size_K: Tensor, bins: int, pixels: int, sampling_ratio: int) -> Tensor:
    """Share of each pixel in the mean of each bin, along one axis: -> (K, bins, pixels).

    Samples up to one pixel outside take the border's value, those farther out count as 0. A box without size has no
    samples where the count follows from the size, and all its shares are 0.
    """
    width_K11 = (size_K / bins)[:, None, None]
    count_K11 = torch.full_like(width_K11, sampling_ratio) if sampling_ratio > 0 else width_K11.ceil().clamp(min=0)
    most = int(count_K11.max()) if len(size_K) else 0
    bin_P1 = torch.arange(bins, device=size_K.device)[:, None]
    sample_S = torch.arange(most, device=size_K.device)
    share_K11 = 1 / count_K11.clamp(min=1)
    at_KPS = start_K[:, None, None] + (bin_P1 + (sample_S + 0.5) * share_K11) * width_K11
    unused_KPS = (sample_S >= count_K11) | (at_KPS < -1) | (at_KPS > pixels)
    share_KPS = share_K11.expand_as(at_KPS).masked_fill(unused_KPS, 0)
    distance_KPSH = at_KPS.clamp(0, pixels - 1)[..., None] - torch.arange(pixels, device=size_K.device)
    return torch.einsum("kps,kpsh->kph", share_KPS, (1 - distance_KPSH.abs()).clamp(min=0))


def _pool(features: Tensor, image_K: Tensor, rows_KPH: Tensor, columns_KQW: Tensor) -> Tensor:
    """Each box's weighted sums over its image's rows and columns: (N, C, H, W) -> (K, C, P, Q)."""
    pooled = features.new_zeros(len(image_K), features.shape[1], rows_KPH.shape[1], columns_KQW.shape[1])
    pooled = pooled + features[:0].sum()  # zero: no boxes, too, must give a result that backward() accepts
    for image in image_K.unique().tolist():
        mine = (image_K == image).nonzero().squeeze(1)
        tall_KPCW = torch.einsum("kph,chw->kpcw", rows_KPH[mine], features[image])
        pooled = pooled.index_copy(0, mine, torch.einsum("kpcw,kqw->kcpq", tall_KPCW, columns_KQW[mine]))
    return pooled
