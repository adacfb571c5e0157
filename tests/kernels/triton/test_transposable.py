"""Transposable 2:4 masks in Triton's interpreter: equal to the reference bit by bit, ties and NaN included."""

import pytest
import torch

from openwork.kernels.cuda.triton.transposable import mask_2_4
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.nm.transposable import transposable_mask

CASES = [
    ((64, 48), 1, 0),
    ((4, 4), 1, 0),
    ((16, 24), 0, 1),  # transformers' Conv1D
    ((8, 12, 3, 3), 1, 0),
    ((12, 8, 2), 0, 1),  # a transposed convolution
    ((3, 8, 16), 2, 1),  # experts
]


def scores(shape, dtype, kind):
    draw = torch.Generator().manual_seed(0)
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=draw).to(dtype)
    weight = torch.randn(shape, generator=draw).abs()
    if kind == "wild":
        weight[torch.rand(shape, generator=draw) < 0.1] = torch.nan
        weight[torch.rand(shape, generator=draw) < 0.1] = torch.inf
        weight[torch.rand(shape, generator=draw) < 0.1] = 0.0
    return weight.to(dtype)


def check_equal(score, dim, output_axis):
    assert torch.equal(
        mask_2_4(score, Axis(dim), Axis(output_axis)),
        transposable_mask(score, Pattern(2, 4), Axis(dim), Axis(output_axis)),
    )


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_the_reference(dtype, kind):
    check_equal(scores((64, 48), dtype, kind), 1, 0)


@pytest.mark.parametrize(("shape", "dim", "output_axis"), CASES)
def test_shapes_with_nan_and_infinity(shape, dim, output_axis):
    check_equal(scores(shape, torch.float32, "wild"), dim, output_axis)


def test_other_strides():
    score = scores((16, 8, 3, 3), torch.float32, "normal").contiguous(memory_format=torch.channels_last)
    expected = transposable_mask(score, Pattern(2, 4), Axis(1), Axis(0))
    found = mask_2_4(score, Axis(1), Axis(0))
    assert found is None or torch.equal(found, expected)
    turned = scores((16, 8), torch.float32, "normal").t()
    assert torch.equal(mask_2_4(turned, Axis(1), Axis(0)), transposable_mask(turned, Pattern(2, 4), Axis(1), Axis(0)))


def test_what_it_cannot_read_is_left_to_the_reference():
    assert mask_2_4(torch.ones(8, 6), Axis(1), Axis(0)) is None
    assert mask_2_4(torch.ones(8, 8, dtype=torch.float64), Axis(1), Axis(0)) is None
    assert mask_2_4(torch.ones(8, 16)[:, ::2], Axis(1), Axis(0)) is None


@pytest.mark.parametrize(
    ("shape", "dim", "output_axis"), [((8, 4, 3), Axis(1), Axis(0, 2)), ((16, 4), Axis(0, 2), Axis(1))]
)
def test_blocks_of_whole_tiles_are_read_and_others_left(shape, dim, output_axis):
    score = scores(shape, torch.float32, "normal")
    expected = transposable_mask(score, Pattern(2, 4), dim, output_axis)
    assert torch.equal(mask_2_4(score, dim, output_axis), expected)
    assert mask_2_4(score.repeat(3, 1, 1)[:12] if score.ndim == 3 else score[:12], dim, output_axis) is None
