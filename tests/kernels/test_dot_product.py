"""Convolutions by dot products, and what their operators refuse; linear layers are in test_sparse_matmul.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import openwork.kernels as kernels
from openwork.layouts import DotProduct
from openwork.layouts.conv import ConvGeometry, conv_rows
from openwork.layouts.dot_product import sizes_of, step_refusal
from openwork.layouts.layout import Request, Vectors
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight
from openwork.ops import sparse_matmul as reference

ops = torch.ops.openwork
P24 = Pattern(2, 4)
SHORT = [torch.bfloat16, torch.int8]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 16), Pattern(3, 16), Pattern(2, 32)]
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
two = st.lists(st.integers(1, 3), min_size=2, max_size=2)
needs_dot_product = pytest.mark.skipif(not kernels.vectors().dot_product, reason="needs AVX-512 with VBMI and VNNI")


def sparse(shape: tuple[int, ...], pattern: Pattern, generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator)
    rows = conv_rows(weight, pattern) if len(shape) == 4 else F.pad(weight, (0, -shape[1] % pattern.m))
    rows = apply_mask(rows, magnitude_mask(rows.abs(), pattern, Axis(1)))
    return rows if len(shape) == 4 else rows[:, : shape[1]]


def packed(rows: Tensor, pattern: Pattern, weight_dtype: torch.dtype) -> DotProduct:
    numbers, scales = quantize_weight(rows, weight_dtype)
    here = kernels.vectors()
    return DotProduct.pack(numbers, scales, pattern, here if here.dot_product else Vectors(lanes=16))


def conv(x: Tensor, layout: DotProduct, bias: Tensor | None, geometry: tuple[Any, ...], relu: bool) -> Tensor:
    return ops.dot_product_conv2d(x, layout.tensors(), bias, layout.integers, flat(geometry), relu)


def flat(geometry: tuple[Any, ...]) -> list[int]:
    """Kernel, stride, padding, dilation and one group, as an operator takes them."""
    return [*(size for pair in geometry for size in pair), 1]


@pytest.mark.parametrize("weight_dtype", SHORT)
@pytest.mark.parametrize("lanes", [8, 16])
def test_a_layout_holds_its_weight(lanes: int, weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for pattern in (Pattern(1, 2), *PATTERNS):
        if step_refusal(weight_dtype, pattern, lanes):
            assert lanes == 8  # of so short windows
            assert pattern.m > 8
            continue
        for O, K in ((1, 1), (5, 37), (lanes, 64), (3 * lanes + 1, 130)):
            weight = sparse((O, K), pattern, generator)
            numbers, scales = quantize_weight(weight, weight_dtype)
            layout = DotProduct.pack(numbers, scales, pattern, Vectors(lanes=lanes))
            assert torch.equal(layout.unpack(), numbers)
            sizes = sizes_of(weight_dtype, pattern, lanes)
            assert sizes.steps * sizes.together == sizes.slots == sizes.window * pattern.n // pattern.m


def test_layouts_that_are_none_say_why() -> None:
    weight = torch.zeros(4, 64)
    for dtype, pattern in (
        (torch.float32, Pattern(2, 4)),
        (torch.bfloat16, Pattern(1, 32)),
        (torch.int8, Pattern(2, 6)),
    ):
        with pytest.raises(ValueError, match="fills no steps of dot products; needed bfloat16 or int8, M one of"):
            DotProduct.pack(weight.to(dtype), None, pattern, Vectors(lanes=16))
    with pytest.raises(ValueError, match=r"the weight .4, 64. is not 2:4: 64 of 64 groups hold more than 2 of 4"):
        DotProduct.pack(torch.ones(4, 64, dtype=torch.bfloat16), None, Pattern(2, 4), Vectors(lanes=16))


@many
@given(data=st.data(), pattern=st.sampled_from(PATTERNS), weight_dtype=st.sampled_from(SHORT), stride=two, dilation=two)
def test_convolution_is_the_dense_one(
    isa: str, data: st.DataObject, pattern: Pattern, weight_dtype: torch.dtype, stride: list[int], dilation: list[int]
) -> None:
    """int8 bit by bit; bfloat16 within the rounding of sums in float32, twice a pair, and of the result."""
    draw, generator = data.draw, torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    kernel = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5]), min_size=2, max_size=2), label="kernel")
    padding = draw(st.lists(st.integers(0, 4), min_size=2, max_size=2), label="padding")
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    H, W = (size + draw(st.one_of(st.integers(0, 6), st.integers(0, 30))) for size in least)
    C, O, N = (
        draw(st.integers(low, high), label=name) for low, high, name in ((1, 70, "C"), (1, 40, "O"), (0, 3, "N"))
    )
    relu, last = draw(st.booleans(), label="relu"), draw(st.booleans(), label="channels_last")
    bias = torch.randn(O, generator=generator) if draw(st.booleans(), label="bias") else None
    rows, x = sparse((O, C, *kernel), pattern, generator), torch.randn(N, C, H, W, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x = x if weight_dtype == torch.int8 else x.bfloat16()
    layout, geometry = packed(rows, pattern, weight_dtype), (kernel, stride, padding, dilation)
    y = conv(x, layout, bias, geometry, relu)
    expected = reference.conv2d(DotProduct, x, layout.tensors(), bias, layout.integers, flat(geometry), relu)
    assert (y.shape, y.dtype) == (expected.shape, x.dtype)
    if weight_dtype == torch.int8:
        assert torch.equal(y, expected)
    else:
        weight = layout.unpack().view(O, *kernel, -1)[..., :C].movedim(-1, 1).double()
        exact = F.conv2d(x.double(), weight, None if bias is None else bias.double(), stride, padding, dilation)
        sizes = (x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
        size = F.conv2d(*sizes, stride, padding, dilation)
        exact = exact.relu() if relu else exact
        bound = (weight[0].numel() + 2) * (2.0**-23 * size + 2.0**-126) + 2.0**-8 * exact.abs()
        assert bool(((y - exact).abs() <= bound).all())
    if last and not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()


@needs_dot_product
@pytest.mark.parametrize("weight_dtype", SHORT)
@pytest.mark.parametrize("threads", [1, 3])
def test_images_with_few_pixels_and_with_many(weight_dtype: torch.dtype, threads: int) -> None:
    """Where rows are few all threads pack first, where they are many each packs for itself: the same results."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    rows = sparse((40, 24, 3, 3), Pattern(2, 4), generator)
    layout, geometry = packed(rows, Pattern(2, 4), weight_dtype), ([3, 3], [1, 1], [1, 1], [1, 1])
    x = torch.randn(2, 24, 41, 40, generator=generator).to(
        torch.float32 if weight_dtype == torch.int8 else weight_dtype
    )
    torch.set_num_threads(threads)
    try:
        whole, alone = conv(x, layout, None, geometry, True), conv(x[1:], layout, None, geometry, True)
        corner = conv(x[1:, :, :6, :6].contiguous(), layout, None, geometry, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[1:], alone)
    if weight_dtype == torch.bfloat16:  # of int8 the scales would be others
        assert torch.equal(corner[..., :5, :5], whole[1:, :, :5, :5])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weight_dtype", SHORT)
def test_what_is_not_finite_surfaces(isa: str, weight_dtype: torch.dtype, bad: float) -> None:
    rows = conv_rows(torch.ones(4, 4, 3, 3) * (torch.arange(4) < 2)[:, None, None], Pattern(2, 4))
    x = torch.rand(2, 4, 6, 6).to(torch.float32 if weight_dtype == torch.int8 else weight_dtype)
    x[1, 0, 2, 2] = bad
    y = conv(x, packed(rows, Pattern(2, 4), weight_dtype), None, ([3, 3], [1, 1], [1, 1], [1, 1]), True)
    assert y[0].isfinite().all()
    near = torch.zeros(6, 6, dtype=torch.bool)
    near[1:4, 1:4] = True
    assert (
        torch.equal(y[1].isfinite(), ~near.expand(4, 6, 6)) if weight_dtype != torch.int8 else bool(y[1].isnan().all())
    )


# --- what is refused -------------------------------------------------------------------------------------------------


def good(operator: str, weight_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments that fit: 10 outputs of 72 inputs at 2:4; a convolution's are 24 channels at 3 x 1."""
    generator = torch.Generator().manual_seed(0)
    layout = packed(sparse((10, 72), Pattern(2, 4), generator), Pattern(2, 4), weight_dtype)
    x = torch.randn(3, 72) if operator == "dot_product_linear" else torch.randn(2, 24, 5, 4)
    made = {
        "x": x if weight_dtype == torch.int8 else x.bfloat16(),
        "values": layout.values,
        "indices": layout.indices,
        "scales": layout.scales,
        "bias": torch.ones(10),
        "numbers": layout.integers,
        "relu": False,
    }
    geometry = {"kernel": [3, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    return made if operator == "dot_product_linear" else made | geometry


OPERATORS = ["dot_product_linear", "dot_product_conv2d"]


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """As the operators take them."""
    packed_ = [each for each in (given["values"], given["indices"], given["scales"]) if each is not None]
    taken = {name: given[name] for name in ("x", "bias", "numbers", "relu")} | {"packed": packed_}
    pairs = [given[name] for name in ("kernel", "stride", "padding", "dilation") if name in given]
    return taken | ({"geometry": flat(tuple(pairs))} if pairs else {})


def refused(operator: str, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=complaint):
        getattr(ops, operator)(**arguments(given))


@needs_dot_product
@pytest.mark.parametrize("weight_dtype", SHORT)
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_input(operator: str, weight_dtype: torch.dtype) -> None:
    fits = good(operator, weight_dtype)
    assert getattr(ops, operator)(**arguments(fits)).isfinite().all()
    for name in ("values", "indices", "bias", "scales"):
        right = fits[name]
        if right is None:
            refused(operator, {**fits, name: torch.ones(10)}, "values .* do not fit")
            continue
        strided = torch.stack([right, right], -1)[..., 0]
        for wrong in (right[1:], right[:0], torch.cat([right, right[:1]]), right.double(), right.bool(), strided):
            complaint = "fills no steps" if name == "values" and wrong.dtype != right.dtype else "do not fit"
            refused(operator, {**fits, name: wrong}, complaint)
    if weight_dtype == torch.int8:
        refused(operator, {**fits, "scales": None}, "values .* do not fit")
    right = fits["numbers"]
    for wrong in ([], right[:-1], [*right, 1]):
        refused(operator, {**fits, "numbers": wrong}, "layout")
    for at, number, complaint in (
        (0, 0, "1 <= N <= M"),
        (0, 5, "1 <= N <= M"),
        (1, 6, "fills no steps"),
        (2, 8, "another instruction set|do not fit"),
        (3, 0, "makes no layout"),
        (3, 40, "do not fit"),
        (4, 0, "makes no layout"),
        (4, 2**40, "do not fit|inputs"),
    ):
        refused(operator, {**fits, "numbers": [*right[:at], number, *right[at + 1 :]]}, complaint)
    x = fits["x"]
    for bad in (x.double(), x.half(), x[:, 4:], torch.tensor(1.0).to(x.dtype)):
        refused(operator, {**fits, "x": bad}, "input")
    for name in ("x", "values", "indices", "bias"):
        refused(operator, {**fits, name: fits[name].to("meta")}, "on cpu, meta; needed one device")
    if operator == "dot_product_conv2d":
        for name, bad, complaint in (
            ("kernel", [3], "kernel"),
            ("kernel", [1, 1], "kernel"),
            ("stride", [0, 1], "stride"),
            ("padding", [-1, 0], "padding"),
            ("dilation", [1], "dilation"),
            ("dilation", [3, 1], "smaller than the kernel"),
        ):
            refused(operator, {**fits, name: bad}, complaint)


@needs_dot_product
@pytest.mark.parametrize("weight_dtype", SHORT)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_indices_stay_inside_the_window(weight_dtype: torch.dtype, data: st.DataObject) -> None:
    """Instructions look at no more bits than a window has inputs."""
    fits = good("dot_product_linear", weight_dtype)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    fits["indices"] = torch.randint(0, 256, fits["indices"].shape, dtype=torch.uint8, generator=generator)
    assert ops.dot_product_linear(**arguments(fits)).isfinite().all()


def test_which_layers_they_take(isa: str) -> None:
    vectors, cpu = kernels.vectors(), torch.device("cpu")

    def takes(dtype: torch.dtype, weight_dtype: torch.dtype, pattern: Pattern = P24, groups: int = 0) -> bool:
        conv = ConvGeometry((2, 2), (1, 1), (0, 0), (1, 1), groups) if groups else None
        return not DotProduct.refusal(Request(pattern, dtype, weight_dtype, cpu, vectors, conv))

    assert takes(torch.bfloat16, torch.bfloat16) == vectors.dot_product
    assert takes(torch.float32, torch.int8) == vectors.dot_product
    assert takes(torch.bfloat16, torch.bfloat16, groups=1) == vectors.dot_product
    assert not takes(torch.float32, torch.bfloat16)  # its inputs would be rounded
    assert not takes(torch.bfloat16, torch.float32)
    assert not takes(torch.bfloat16, torch.bfloat16, groups=2)
    assert not takes(torch.float32, torch.int8, Pattern(3, 6))
