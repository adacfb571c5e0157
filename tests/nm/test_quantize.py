"""Absmax quantization: how far numbers are from what they stand for, and what cannot be quantized."""

from __future__ import annotations

import pytest
import torch

from openwork.nm.quantize import quantize, quantize_to_whole, quantize_weight


def test_int8_errs_by_half_a_step_and_float8_by_half_of_its_last_digit() -> None:
    x = (
        torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
        * torch.tensor([10.0**i for i in range(7)])[:, None, None]
    )
    whole, scales = quantize(x, torch.int8)
    assert (whole.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (7,))
    assert whole.flatten(1).abs().amax(1).tolist() == [127] * 7
    steps = scales[:, None, None]
    assert bool(((whole.float() * steps - x).abs() <= 0.5001 * steps).all())
    eighths, scales = quantize(x, torch.float8_e4m3fn)
    assert eighths.float().flatten(1).abs().amax(1).tolist() == [448.0] * 7
    steps = scales[:, None, None]
    error = (eighths.float() * steps - x).abs()
    assert bool((error <= 2.0**-4 * 1.0001 * x.abs() + 2.0**-10 * steps).all())


def test_rows_of_zeros_stay_zeros_and_nan_stays_in_whole_floats() -> None:
    assert quantize(torch.zeros(2, 3), torch.int8)[1].tolist() == [1.0, 1.0]
    whole, scales = quantize_to_whole(torch.tensor([[1.0, torch.nan], [2.0, -1.0]]))
    assert bool(whole[0].isnan().all())
    assert bool(scales[0].isnan())
    assert whole[1].tolist() == [127.0, -64.0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_weight_that_is_not_finite_has_no_int8(bad: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match=r"the weight \(2, 3\) holds numbers that are not finite, which int8 cannot"):
        quantize_weight(weight, torch.int8)
