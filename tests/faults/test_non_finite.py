"""Where NaN and infinity of an input reach, kernel by kernel, as docs/limits.md says; and in masks and decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.inference.layers import pack_layer
from openwork.layouts.layout import kind_named
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask

STATUS = ow.kernels.status()
PATTERNS = ("2:4", "1:16", "3:8", "4:4", "2:5")
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -1.0, 3e38])


def layer_of(kind: str, pattern: str, weight_dtype: torch.dtype, conv: bool) -> tuple[Any, Tensor]:
    """A packed layer, and which of its weights have a slot: (O, K) or (O, C, R, S)."""
    layer = nn.Conv2d(16, 9, 3, bias=False) if conv else nn.Linear(80, 37, bias=False)
    ow.project(layer, pattern)
    weight = layer.weight.detach()
    weight[0] = 0  # slots that hold zeros
    kept = magnitude_mask(weight.abs(), ow.Pattern.parse(pattern), Axis(1))
    return pack_layer(
        layer.eval().requires_grad_(False), ow.Pattern.parse(pattern), kind_named(kind), weight_dtype
    ), kept


@pytest.mark.skipif(STATUS.isa is None, reason=str(STATUS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", ["gemm", "gemv"])
def test_linear_kernels(kind: str, weight_dtype: torch.dtype, value: float, isa: str) -> None:
    for pattern in PATTERNS:
        if kind == "gemv" and pattern == "2:5":
            continue
        layer, kept = layer_of(kind, pattern, weight_dtype, conv=False)
        for rows in (1, 3, 9, 140):
            x = torch.randn(rows, 80)
            clean = layer(x)
            k, row = int(torch.randint(80, ())), int(torch.randint(rows, ()))
            x[row, k] = value
            found = layer(x)
            reached = torch.zeros(rows, 37, dtype=torch.bool)
            reached[row] = True if weight_dtype == torch.int8 else kept[:, k]
            assert torch.equal(~found.isfinite(), reached), (pattern, rows)
            elsewhere = torch.arange(rows) != row
            assert torch.equal(found[elsewhere], clean[elsewhere])
            layer.relu = True
            assert torch.equal(layer(x).isnan(), found.isnan())  # NaN passes a ReLU that was folded in
            layer.relu = False


@pytest.mark.skipif(STATUS.isa is None, reason=str(STATUS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_convolutions(weight_dtype: torch.dtype, value: float, isa: str) -> None:
    for pattern in ("2:4", "1:16"):
        layer, kept = layer_of("gemm", pattern, weight_dtype, conv=True)
        x = torch.randn(2, 16, 7, 7)
        clean = layer(x)
        x[1, 5, 3, 2] = value
        found = layer(x)
        ones = torch.zeros(1, 16, 7, 7)
        ones[0, 5, 3, 2] = 1
        reached = nn.functional.conv2d(ones, kept.float())[0] > 0
        assert torch.equal(~found[1].isfinite(), torch.ones_like(reached) if weight_dtype == torch.int8 else reached)
        assert torch.equal(found[0], clean[0])


def test_the_references_multiply_zeros_as_dense_layers_do(no_library: None) -> None:
    layer, _ = layer_of("gemm", "2:4", torch.float32, conv=False)
    x = torch.randn(3, 80)
    x[1, 7] = float("nan")
    assert torch.equal(layer(x).isnan().all(1), torch.tensor([False, True, False]))
    assert layer(x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 64), (8, 16, 3, 3), (5, 40)])
def test_masks_of_any_numbers(dtype: torch.dtype, shape: tuple[int, ...], isa: str) -> None:
    """NaN counts as largest, equal magnitudes keep the lower index, zeros of both signs and denormals are numbers."""
    for pattern in ("2:4", "1:16", "3:8", "1:2", "2:5"):
        n, m = map(int, pattern.split(":"))
        weight = SPECIAL[torch.randint(len(SPECIAL), shape)].to(dtype)
        if shape[1] % m:
            continue
        ops, axes = torch.ops.openwork, [1, 1, 0]
        right = magnitude_mask(weight.abs(), ow.Pattern(n, m), Axis(1))
        assert torch.equal(ops.foreach_mask([weight.abs()], n, m, axes)[0], right)
        pruned = ops.foreach_prune([weight], n, m, axes)[0]
        assert _bits(pruned).equal(_bits(torch.where(right, weight, torch.zeros_like(weight))))
        gradient = torch.randn(shape).to(dtype)
        before = gradient.clone()
        ops.foreach_decay([gradient], [weight], 0.5, n, m, axes)
        assert torch.equal(gradient[right], before[right])  # what is kept gets nothing, whatever is pruned beside it
        added = before + (weight * 0.5)
        assert torch.equal(gradient[~right].isfinite(), added[~right].isfinite())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("rate", [float("inf"), -float("inf"), float("nan")])
def test_a_decay_is_finite(rate: float) -> None:
    for method in (ow.SRSTE, ow.TransposableSRSTE):
        with pytest.raises(ValueError, match=r"decay=-?(inf|nan); needed a finite number"):
            method(decay=rate)
    with pytest.raises(ValueError, match=r"decay=Ellipsis; needed a finite number"):
        ow.SRSTE(decay=...)
    gradient, weight = torch.zeros(4, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"rate=.*; needed a finite number"):
        torch.ops.openwork.foreach_decay([gradient], [weight], rate, 2, 4, [1, 1, 0])
    assert not gradient.any()
