"""The operators on compressed weights, on every instruction set, against dense products in float64.

Bounds: with weights in float32 or bfloat16 a sum of t products in float32 in any order, one rounding a multiply-add,
errs by no more than (t + 2) * 2^-24 * sum of |products|, bias included. With int8 weights the sums are whole numbers
and exact; what is scaled after that equals the reference bit by bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import openwork.kernels as kernels
from openwork.layouts import DotProduct, Gemm, Gemv
from openwork.layouts.conv import conv_rows
from openwork.layouts.cpu import WINDOWS
from openwork.layouts.layout import Vectors, kind_named
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight
from openwork.ops import sparse_matmul as reference

ops = torch.ops.openwork
Layout = Gemm | Gemv | DotProduct
FLOATS, WEIGHT_DTYPES = [torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16, torch.int8]
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

patterns = st.one_of(st.sampled_from([2, 4, 8, 16, 32]), st.integers(1, 64)).flatmap(
    lambda m: st.builds(Pattern, st.integers(1, m), st.just(m))
)


def sparse(shape: tuple[int, ...], pattern: Pattern, generator: torch.Generator) -> Tensor:
    """A weight with up to N non-zeros in every group along dim 1, and now and then fewer."""
    weight = torch.randn(shape, generator=generator)
    groups = F.pad(torch.rand(shape, generator=generator).movedim(1, -1), (0, -shape[1] % pattern.m)).unflatten(
        -1, (-1, pattern.m)
    )
    rank = groups.argsort(-1, descending=True).argsort(-1)
    keep = (rank < pattern.n).flatten(-2)[..., : shape[1]].movedim(-1, 1)
    return weight * keep * (torch.rand(shape, generator=generator) < 0.95)


def weight_dtype(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight as kernels keep it, and the scales of its outputs where it is int8."""
    return quantize_weight(weight, dtype)


def linear(x: Tensor, layout: Layout, bias: Tensor | None, relu: bool) -> Tensor:
    x = x.bfloat16() if isinstance(layout, DotProduct) and layout.scales is None else x
    return getattr(ops, f"{layout.name}_linear")(x, layout.tensors(), bias, layout.integers, relu)


def packed(weight: Tensor, pattern: Pattern, kind: str, dtype: torch.dtype) -> Layout:
    numbers, scales = weight_dtype(weight, dtype)
    vectors = kernels.vectors()
    if kind == "dot_product" and not vectors.dot_product:
        vectors = dataclasses.replace(vectors, lanes=16)
    return kind_named(kind).pack(numbers, scales, pattern, vectors)  # type: ignore[return-value]


def within_bound(y: Tensor, product: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> bool:
    """Whether y is product(x, weight) + bias as far as float32 can tell; `weight` holds what is multiplied."""
    exact = product(x.double(), weight.double(), None if bias is None else bias.double())
    size = product(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    terms = int((weight != 0).flatten(1).sum(1).max()) if weight.numel() else 0
    exact = exact.relu() if relu else exact
    return y.shape == exact.shape and bool(((y - exact).abs() <= (terms + 2) * 2.0**-24 * size).all())


def good(y: Tensor, x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None, relu: bool) -> bool:
    if isinstance(layout, DotProduct) and layout.scales is None:
        return within_bfloat16(y, x.bfloat16().double(), weight_dtype(weight, torch.bfloat16)[0].double(), bias, relu)
    if layout.scales is None:
        return within_bound(y, F.linear, x, weight_dtype(weight, layout.values.dtype)[0].float(), bias, relu)
    return torch.equal(y, reference.linear(type(layout), x, layout.tensors(), bias, layout.integers, relu))


def within_bfloat16(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> bool:
    """Whether y is the product of bfloat16 numbers, summed in float32 and rounded to bfloat16. The instruction rounds
    twice a pair, and takes numbers below 2^-126 for zero."""
    b = None if bias is None else bias.double()
    exact, size = F.linear(x, weight, b), F.linear(x.abs(), weight.abs(), None if b is None else b.abs())
    exact = exact.relu() if relu else exact
    terms = int((weight != 0).sum(1).max()) + 2
    bound = terms * (2.0**-23 * size + 2.0**-126) + 2.0**-8 * exact.abs()
    return y.dtype == torch.bfloat16 and y.shape == exact.shape and bool(((y - exact).abs() <= bound).all())


@st.composite
def inputs(draw: st.DrawFn, K: int, generator: torch.Generator) -> Tensor:
    """(..., K) in any order in memory."""
    B = draw(st.one_of(st.integers(0, 9), st.integers(0, 2 * kernels.vectors().columns + 1)))
    how = draw(st.sampled_from(["plain", "plain", "wide", "shifted", "transposed", "three", "none", "same"]))
    x = torch.randn(B, K, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    if how == "wide":
        return F.pad(x, (0, 3))[:, :K]
    if how == "shifted":
        return F.pad(x, (1, 0)).flatten()[1:].as_strided((B, K), (K + 1, 1)) if B else x
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "three":
        return torch.stack([x, -x]).transpose(0, 1)
    if how == "none":
        return x[0] if B else x[None]
    return x[:1].expand(B, K) if how == "same" and B else x


# --- linear --------------------------------------------------------------------------------------------------------


@many
@given(data=st.data(), pattern=patterns, dtype=st.sampled_from(WEIGHT_DTYPES), kind=st.sampled_from(["gemm", "gemv"]))
def test_linear_is_the_dense_product(
    isa: str, data: st.DataObject, pattern: Pattern, dtype: torch.dtype, kind: str
) -> None:
    if kind == "gemv" and pattern.m not in WINDOWS:
        kind = "gemm"
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    O, K = data.draw(st.integers(1, 70), label="O"), data.draw(st.integers(1, 200), label="K")
    x, relu = data.draw(inputs(K, generator), label="x"), data.draw(st.booleans(), label="relu")
    bias = torch.randn(O, generator=generator) if data.draw(st.booleans(), label="bias") else None
    weight = sparse((O, K), pattern, generator)
    layout = packed(weight, pattern, kind, dtype)
    y = linear(x, layout, bias, relu)
    assert y.shape == (*x.shape[:-1], O)
    assert y.dtype == torch.float32
    assert good(y.reshape(-1, O), x.reshape(-1, K), weight, layout, bias, relu)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("kind", ["gemm", "gemv"])
def test_every_number_of_columns(isa: str, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = sparse((9, 21), Pattern(2, 4), generator), torch.randn(9, generator=generator)
    layout = packed(weight, Pattern(2, 4), kind, dtype)
    for B in range(2 * kernels.vectors().columns + 2):
        x = torch.randn(B, 21, generator=generator)
        assert good(linear(x, layout, bias, False), x, weight, layout, bias, False), B


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("kind", ["gemm", "gemv"])
def test_every_number_of_outputs(isa: str, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for O in (*range(1, 3 * kernels.vectors().lanes + 2), 255, 256, 257, 300):
        weight, bias = sparse((O, 24), Pattern(1, 4), generator), torch.randn(O, generator=generator)
        layout = packed(weight, Pattern(1, 4), kind, dtype)
        x = torch.randn(3, 24, generator=generator)
        assert good(linear(x, layout, bias, True), x, weight, layout, bias, True), O


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
def test_every_slot_of_a_window(isa: str, m: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m)
    for n in range(1, m + 1):
        weight = sparse((11, 3 * m + 1), Pattern(n, m), generator)
        layout = packed(weight, Pattern(n, m), "gemv", dtype)
        for B in (1, 2, 9):
            x = torch.randn(B, 3 * m + 1, generator=generator)
            assert good(linear(x, layout, None, False), x, weight, layout, None, False), (n, B)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_surfaces(isa: str, kind: str, dtype: torch.dtype, bad: float) -> None:
    """Also through ReLU. A product that is not computed cannot make NaN: pruned weights meet no input."""
    weight = sparse((20, 16), Pattern(2, 4), torch.Generator().manual_seed(0)).abs()
    x = torch.rand(5, 16)
    x[3, 6] = bad
    y = linear(x, packed(weight, Pattern(2, 4), kind, dtype), None, True)
    met = torch.zeros(5, 20, dtype=torch.bool)
    met[3] = weight[:, 6] != 0
    assert met.any()
    assert torch.equal(y.isfinite(), ~met)
    assert bool((y[met].isnan() if bad != bad else y[met] == bad).all())


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_surfaces_in_the_whole_int8_row(isa: str, kind: str, bad: float) -> None:
    layout = packed(sparse((20, 16), Pattern(2, 4), torch.Generator().manual_seed(0)), Pattern(2, 4), kind, torch.int8)
    x = torch.rand(5, 16)
    x[3, 6] = bad
    for relu in (False, True):
        y = linear(x, layout, None, relu)
        assert torch.equal(y.isnan().any(1), torch.arange(5) == 3)
        assert y[3].isnan().all()


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
def test_int8_inputs_next_to_zero_are_zero(isa: str, kind: str) -> None:
    layout = packed(sparse((20, 16), Pattern(2, 4), torch.Generator().manual_seed(0)), Pattern(2, 4), kind, torch.int8)
    for size in (0.0, 1e-45, 5e-44, 1e-38):
        y = linear(torch.full((3, 16), size), layout, torch.ones(20), False)
        assert torch.equal(y, torch.ones(3, 20)), size


# --- products whose inputs are as short as the weights ---------------------------------------------------------------

SHORT = [torch.bfloat16, torch.int8]


@many
@given(
    data=st.data(),
    pattern=st.sampled_from([2, 4, 8, 16]).flatmap(lambda m: st.builds(Pattern, st.integers(1, m), st.just(m)))
    | st.builds(Pattern, st.integers(1, 16).map(lambda half: 2 * half), st.just(32)),
    dtype=st.sampled_from(SHORT),
)
def test_dot_products_are_the_dense_product(
    isa: str, data: st.DataObject, pattern: Pattern, dtype: torch.dtype
) -> None:
    """Also without the instructions: there the reference runs."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    O, K = data.draw(st.integers(1, 70), label="O"), data.draw(st.integers(1, 200), label="K")
    x, relu = data.draw(inputs(K, generator), label="x"), data.draw(st.booleans(), label="relu")
    bias = torch.randn(O, generator=generator) if data.draw(st.booleans(), label="bias") else None
    weight = sparse((O, K), pattern, generator)
    layout = packed(weight, pattern, "dot_product", dtype)
    y = linear(x, layout, bias, relu)
    assert y.shape == (*x.shape[:-1], O)
    assert good(y.reshape(-1, O), x.reshape(-1, K), weight, layout, bias, relu)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 16)])  # eight steps a window, and one
def test_dot_products_of_every_number_of_rows(isa: str, pattern: Pattern, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = sparse((49, 133), pattern, generator), torch.randn(49, generator=generator)
    layout = packed(weight, pattern, "dot_product", dtype)
    for B in (*range(40), 95, 96, 97, 200):
        x = torch.randn(B, 133, generator=generator)
        assert good(linear(x, layout, bias, False), x, weight, layout, bias, False), B


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", SHORT)
def test_dot_products_on_several_threads(isa: str, dtype: torch.dtype, threads: int) -> None:
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    weight, x = sparse((300, 256), Pattern(2, 4), generator), torch.randn(230, 256, generator=generator)
    layout = packed(weight, Pattern(2, 4), "dot_product", dtype)
    torch.set_num_threads(threads)
    try:
        assert good(linear(x, layout, None, False), x, weight, layout, None, False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_surfaces_from_dot_products(isa: str, bad: float) -> None:
    weight = sparse((20, 40), Pattern(2, 4), torch.Generator().manual_seed(0)).abs()
    x = torch.rand(5, 40)
    x[3, 6] = bad
    y = linear(x, packed(weight, Pattern(2, 4), "dot_product", torch.bfloat16), None, True)
    assert y[[0, 1, 2, 4]].isfinite().all()
    met = weight[:, 6] != 0
    assert met.any()
    assert not y[3, met].isfinite().any() or bad == -torch.inf
    y = linear(x, packed(weight, Pattern(2, 4), "dot_product", torch.int8), None, True)
    assert torch.equal(y.isnan().any(1), torch.arange(5) == 3)
    assert y[3].isnan().all()


def test_int8_dot_products_are_those_of_the_other_kernels(isa: str) -> None:
    """Whole numbers are exact: the choice of a kernel does not change a result."""
    generator = torch.Generator().manual_seed(0)
    weight, x = sparse((40, 100), Pattern(2, 4), generator), torch.randn(30, 100, generator=generator)
    kinds = ("gemm", "gemv", "dot_product")
    by_gemm, by_gemv, by_dot_product = (
        linear(x, packed(weight, Pattern(2, 4), kind, torch.int8), None, True) for kind in kinds
    )
    assert torch.equal(by_dot_product, by_gemm)
    assert torch.equal(by_dot_product, by_gemv)


def test_long_int8_sums_do_not_overflow(isa: str) -> None:
    """The largest inputs and weights: with 128 added to inputs a sum passes 2^31 on its way and comes back."""
    K = 2**18
    weight = torch.ones(1, K) * (torch.arange(K) % 2 == 0)
    y = linear(torch.ones(1, K), packed(weight, Pattern(2, 4), "dot_product", torch.int8), None, False)
    assert y.item() == pytest.approx(K / 2, rel=1e-6)


# --- convolutions --------------------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    layout: Gemm,
    bias: Tensor | None,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> Tensor:
    geometry = [*kernel, *stride, *padding, *dilation, groups]
    return ops.gemm_conv2d(x, layout.tensors(), bias, layout.integers, geometry, relu)


def packed_conv(weight: Tensor, pattern: Pattern, dtype: torch.dtype) -> Gemm:
    layout = packed(conv_rows(weight, pattern), pattern, "gemm", dtype)
    assert isinstance(layout, Gemm)
    return layout


two = st.lists(st.integers(1, 3), min_size=2, max_size=2)


@many
@given(
    data=st.data(),
    pattern=patterns,
    dtype=st.sampled_from(WEIGHT_DTYPES),
    stride=two,
    dilation=two,
    groups=st.integers(1, 3),
)
def test_convolution_is_the_dense_one(
    isa: str,
    data: st.DataObject,
    pattern: Pattern,
    dtype: torch.dtype,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    draw, generator = data.draw, torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    kernel = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5]), min_size=2, max_size=2), label="kernel")
    padding = draw(st.lists(st.integers(0, 4), min_size=2, max_size=2), label="padding")
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    H, W = (size + draw(st.one_of(st.integers(0, 6), st.integers(0, 40))) for size in least)
    C, O, N = (
        draw(st.integers(1, 24), label="C"),
        groups * draw(st.integers(1, 12), label="O"),
        draw(st.integers(0, 3), label="N"),
    )
    relu, last = draw(st.booleans(), label="relu"), draw(st.booleans(), label="channels_last")
    bias = torch.randn(O, generator=generator) if draw(st.booleans(), label="bias") else None
    weight, x = sparse((O, C, *kernel), pattern, generator), torch.randn(N, C * groups, H, W, generator=generator)
    how = draw(st.sampled_from(["plain", "plain", "slice", "transposed"]), label="x")
    x = (
        F.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2]
        if how == "slice"
        else x.transpose(2, 3).contiguous().transpose(2, 3)
        if how == "transposed"
        else x
    )
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    layout, geometry = packed_conv(weight, pattern, dtype), (kernel, stride, padding, dilation, groups)
    y = conv(x, layout, bias, *geometry, relu)
    if layout.scales is None:
        product = lambda x, w, b: F.conv2d(x, w, b, stride, padding, dilation, groups)  # noqa: E731
        assert within_bound(y, product, x, weight_dtype(weight, dtype)[0].float(), bias, relu)
    else:
        given = (x, layout.tensors(), bias, layout.integers, [*kernel, *stride, *padding, *dilation, groups])
        assert torch.equal(y, reference.conv2d(Gemm, *given, relu))
    if last and not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("channels", "size"), [(12, 3), (12, 40), (2080, 3)])
def test_few_and_many_panels_on_several_threads(
    isa: str, dtype: torch.dtype, threads: int, channels: int, size: int
) -> None:
    """Where panels are few all threads gather first; where they are many, or inputs too, each gathers for itself."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    layout = packed_conv(sparse((8, channels, 3, 3), Pattern(2, 4), generator), Pattern(2, 4), dtype)
    x = torch.randn(2, channels, size, size, generator=generator)
    given = (x, layout.tensors(), None, layout.integers, [3, 3, 1, 1, 1, 1, 1, 1, 1], False)
    torch.set_num_threads(threads)
    try:
        y, expected = ops.gemm_conv2d(*given), reference.conv2d(Gemm, *given)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(y, expected, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_images_one_pixel_wide_are_as_those_one_pixel_high(isa: str, dtype: torch.dtype) -> None:
    """Sound and other series in Conv2d: the kernel reads neighbours, whichever dim they lie along."""
    generator = torch.Generator().manual_seed(0)
    layout = packed_conv(sparse((9, 8, 5, 1), Pattern(1, 4), generator), Pattern(1, 4), dtype)
    x = torch.randn(2, 8, 150, 1, generator=generator)
    high = [5, 1], [2, 1], [3, 0], [4, 1]
    wide = tuple(pair[::-1] for pair in high)
    y = conv(x, layout, None, *high, 1, False)
    assert y.shape == (2, 9, 70, 1)
    assert torch.equal(y, conv(x.transpose(2, 3).contiguous(), layout, None, *wide, 1, False).transpose(2, 3))
    given = (x, layout.tensors(), None, layout.integers, [number for pair in high for number in pair] + [1], False)
    assert torch.allclose(y, reference.conv2d(Gemm, *given), atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_what_is_not_finite_surfaces_from_a_convolution(isa: str, dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(4, 4, 3, 3) * (torch.arange(4) < 2)[:, None, None]
    x = torch.rand(2, 4, 6, 6)
    x[1, 0, 2, 2] = bad
    y = conv(x, packed_conv(weight, Pattern(2, 4), dtype), None, [3, 3], [1, 1], [1, 1], [1, 1], 1, True)
    assert y[0].isfinite().all()
    near = torch.zeros(6, 6, dtype=torch.bool)
    near[1:4, 1:4] = True
    assert torch.equal(y[1].isfinite(), ~near.expand(4, 6, 6)) if dtype != torch.int8 else bool(y[1].isnan().all())


# --- the surroundings ----------------------------------------------------------------------------------------------


def test_without_the_library_references_run(no_library: None) -> None:
    assert kernels.vectors() == Vectors(lanes=8, columns=64, dot_product=False)
    weight = sparse((9, 20), Pattern(2, 4), torch.Generator().manual_seed(0))
    x = torch.randn(3, 20)
    for kind in ("gemm", "gemv"):
        assert torch.allclose(
            linear(x, packed(weight, Pattern(2, 4), kind, torch.float32), None, False), x @ weight.t(), atol=1e-5
        )
    image = torch.randn(1, 20, 5, 5)
    y = conv(
        image,
        packed_conv(weight[..., None, None], Pattern(2, 4), torch.float32),
        None,
        [1, 1],
        [1, 1],
        [0, 0],
        [1, 1],
        1,
        False,
    )
    assert torch.allclose(y, F.conv2d(image, weight[..., None, None]), atol=1e-5)


@pytest.mark.parametrize("kind", ["gemm", "gemv"])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_results_are_float32_whatever_the_defaults_of_torch(isa: str, kind: str, dtype: torch.dtype) -> None:
    weight = sparse((9, 20), Pattern(2, 4), torch.Generator().manual_seed(0))
    layout, x, image = packed(weight, Pattern(2, 4), kind, dtype), torch.randn(3, 20), torch.randn(1, 20, 5, 5)
    wide = packed_conv(weight[..., None, None], Pattern(2, 4), dtype)
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1], 1, False)
    expected, expected_image = linear(x, layout, None, False), conv(image, wide, None, *geometry)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y, z = linear(x, layout, None, False), conv(image, wide, None, *geometry)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, expected)
    assert torch.equal(z, expected_image)


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20)])
def test_no_rows_give_no_rows(isa: str, shape: tuple[int, ...]) -> None:
    weight = sparse((9, 20), Pattern(2, 4), torch.Generator().manual_seed(0))
    for kind in ("gemm", "gemv"):
        for dtype in WEIGHT_DTYPES:
            y = linear(torch.zeros(shape), packed(weight, Pattern(2, 4), kind, dtype), torch.zeros(9), True)
            assert y.shape == (*shape[:-1], 9)
    image = torch.zeros(0, 20, 5, 5)
    y = conv(
        image,
        packed_conv(weight[..., None, None], Pattern(2, 4), torch.int8),
        None,
        [1, 1],
        [1, 1],
        [0, 0],
        [1, 1],
        1,
        True,
    )
    assert y.shape == (0, 9, 5, 5)
