"""Thin products in the interpreter against the dense product, for every pattern's shape of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openwork.kernels.cuda.triton import skinny as kernels
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.skinny import from_thin, thin

CASES = [
    ((2, 4), (40, 64), 1),
    ((1, 4), (16, 72), 5),
    ((2, 5), (33, 47), 2),
    ((4, 8), (17, 24), 5),
    ((1, 16), (20, 100), 3),
    ((3, 20), (16, 50), 1),
    ((2, 64), (18, 130), 4),
    ((9, 16), (16, 40), 2),  # slots in a loop
    ((32, 64), (16, 70), 1),
]


def made(pattern: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape).to(dtype)
    return apply_mask(weight, magnitude_mask(weight.abs(), Pattern(*pattern), Axis(1)))


# Not expanded in bfloat16: Triton's interpreter has no product of that.
@pytest.mark.parametrize(("expand", "dtype"), [(False, torch.float16), (False, torch.bfloat16), (True, torch.float16)])
@pytest.mark.parametrize(("pattern", "shape", "rows"), CASES)
def test_a_thin_product_is_the_dense_one(
    pattern: Any, shape: Any, rows: int, expand: bool, dtype: torch.dtype, monkeypatch: Any
) -> None:
    monkeypatch.delattr(kernels, "reference")
    weight = made(pattern, shape, dtype)
    layout = thin(weight, Pattern(*pattern))
    assert torch.equal(from_thin(layout), weight)
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    for added, relu in ((bias, True), (None, False)):
        y = kernels.thin_linear(x, layout.values, layout.words, added, layout.numbers, expand, relu)
        exact = x.double() @ weight.double().t() + (0 if added is None else added.double())
        exact = exact.relu() if relu else exact
        error = (y.double() - exact).abs()
        assert y.dtype == dtype
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-5 * shape[1]).all()


def test_parts_of_the_reduction_are_all_added(monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "processors", lambda _: 100)
    weight = made((2, 4), (16, 1024), torch.float16)
    layout, x = thin(weight, Pattern(2, 4)), torch.randint(-2, 3, (2, 1024)).half()
    for expand in (False, True):
        y = kernels.thin_linear(x, layout.values, layout.words, None, layout.numbers, expand, False)
        assert torch.allclose(y.double(), x.double() @ weight.double().t(), rtol=2e-3, atol=1e-2)
    assert kernels.parts_of(1024, 32, 1, 100) == 8


def test_how_the_reduction_is_cut() -> None:
    assert kernels.parts_of(groups=1024, at_once=16, columns=128, processors=132) == 5
    assert kernels.parts_of(groups=8, at_once=16, columns=1, processors=132) == 1


@pytest.mark.parametrize("wrong", ["values", "words", "x", "bias"])
def test_tensors_of_another_layout_are_refused(wrong: str) -> None:
    layout = thin(made((2, 4), (16, 32), torch.float16), Pattern(2, 4))
    given = {
        "x": torch.zeros(1, 32).half(),
        "values": layout.values,
        "words": layout.words,
        "bias": torch.zeros(16).half(),
    }
    given[wrong] = given[wrong][..., :-1]
    with pytest.raises(ValueError, match=r"needed|do not fit"):
        kernels.thin_linear(*given.values(), layout.numbers, False, False)
