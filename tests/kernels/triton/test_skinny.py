"""Skinny GEMM in the interpreter against the dense product, for every pattern's shape of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from openwork.kernels.cuda.triton import skinny as kernels
from openwork.layouts.layout import KernelRefused, Vectors
from openwork.layouts.skinny import SkinnyGather
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern

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


def packed(weight: torch.Tensor, pattern: Pattern) -> SkinnyGather:
    return SkinnyGather.pack(weight, None, pattern, Vectors())  # type: ignore[return-value]


# Not expanded in bfloat16: Triton's interpreter has no product of that.
@pytest.mark.parametrize(("expand", "dtype"), [(False, torch.float16), (False, torch.bfloat16), (True, torch.float16)])
@pytest.mark.parametrize(("pattern", "shape", "rows"), CASES)
def test_skinny_gemm_is_the_dense_product(
    pattern: Any, shape: Any, rows: int, expand: bool, dtype: torch.dtype, monkeypatch: Any
) -> None:
    monkeypatch.delattr(kernels, "reference")
    weight = made(pattern, shape, dtype)
    layout = packed(weight, Pattern(*pattern))
    assert torch.equal(layout.unpack(), weight)
    linear = kernels.skinny_expand_linear if expand else kernels.skinny_gather_linear
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    for added, relu in ((bias, True), (None, False)):
        y = linear(x, layout.tensors(), added, layout.integers, relu)
        exact = x.double() @ weight.double().t() + (0 if added is None else added.double())
        exact = exact.relu() if relu else exact
        error = (y.double() - exact).abs()
        assert y.dtype == dtype
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-5 * shape[1]).all()


def test_parts_of_the_reduction_are_all_added(monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "processors", lambda _: 100)
    weight = made((2, 4), (16, 1024), torch.float16)
    layout, x = packed(weight, Pattern(2, 4)), torch.randint(-2, 3, (2, 1024)).half()
    for linear in (kernels.skinny_gather_linear, kernels.skinny_expand_linear):
        y = linear(x, layout.tensors(), None, layout.integers, False)
        assert torch.allclose(y.double(), x.double() @ weight.double().t(), rtol=2e-3, atol=1e-2)
    assert kernels.parts_of(1024, 32, 1, 100) == 8


def test_how_the_reduction_is_cut() -> None:
    assert kernels.parts_of(groups=1024, at_once=16, columns=128, processors=132) == 5
    assert kernels.parts_of(groups=8, at_once=16, columns=1, processors=132) == 1


@pytest.mark.parametrize("wrong", ["values", "indices", "x", "bias"])
def test_tensors_of_another_layout_are_refused(wrong: str) -> None:
    layout = packed(made((2, 4), (16, 32), torch.float16), Pattern(2, 4))
    given = {
        "x": torch.zeros(1, 32).half(),
        "values": layout.values,
        "indices": layout.indices,
        "bias": torch.zeros(16).half(),
    }
    given[wrong] = given[wrong][..., :-1]
    with pytest.raises(ValueError, match=r"needed|do not fit"):
        kernels.skinny_gather_linear(
            given["x"], [given["values"], given["indices"]], given["bias"], layout.integers, False
        )


def test_what_triton_does_not_compile_is_a_refusal_and_other_errors_are_ours(monkeypatch: Any) -> None:
    layout = packed(made((2, 4), (16, 32), torch.float16), Pattern(2, 4))
    given = (torch.zeros(1, 32).half(), layout.tensors(), None, layout.integers, False)
    for error, raised in ((OutOfResources(9, 8, "shared memory"), KernelRefused), (TypeError("ours"), TypeError)):

        class Fails:
            def __init__(self, error: Exception) -> None:
                self.error = error

            def __getitem__(self, grid: Any) -> Any:
                raise self.error

        monkeypatch.setattr(kernels, "_gather", Fails(error))
        with pytest.raises(raised):
            kernels.skinny_gather_linear(*given)
