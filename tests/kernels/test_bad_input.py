"""Operators on damaged layouts and wrong inputs: an exception that says what does not fit, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import openwork.kernels as kernels
from openwork.layouts import Gemm, Gemv
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight

ops = torch.ops.openwork
Given = dict[str, Any]
WEIGHT_DTYPES = [torch.float32, torch.bfloat16, torch.int8]
# Which of them a damage does not touch, by name of the operator.
OPERATORS = ["gemm_linear", "gemv_linear", "gemm_conv2d"]


def good(operator: str, weight_dtype: torch.dtype = torch.float32) -> Given:
    """Arguments that fit: 10 outputs of 24 inputs at 2:4; a convolution's are 6 channels, rounded up to 8, at 3 x 1."""
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0, 0, 1] * 6)
    numbers, scales = quantize_weight(weight, weight_dtype)
    given: Given = {"scales": scales, "bias": torch.ones(10), "relu": False}
    kind: Any = Gemv if operator == "gemv_linear" else Gemm
    layout = kind.pack(numbers, scales, Pattern(2, 4), kernels.vectors())
    given |= {"values": layout.values, "numbers": layout.integers, where(operator): layout.tensors()[1]}
    if operator != "gemm_conv2d":
        return {**given, "x": torch.randn(3, 24)}
    geometry = {"kernel": [3, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    return {**given, **geometry, "x": torch.randn(2, 6, 5, 4)}


def where(operator: str) -> str:
    """The name of what says where inputs are."""
    return "indices" if operator == "gemv_linear" else "offsets"


def call(operator: str, given: Given) -> Tensor:
    packed = [each for each in (given["values"], given[where(operator)], given["scales"]) if each is not None]
    taken = {name: given[name] for name in ("x", "bias", "numbers", "relu")} | {"packed": packed}
    if "kernel" in given:
        pairs = (given[name] for name in ("kernel", "stride", "padding", "dilation"))
        taken["geometry"] = [*(size for pair in pairs for size in pair), given["groups"]]
    return getattr(ops, operator)(**taken)


def refused(operator: str, given: Given, complaint: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=complaint):
        call(operator, given)


def put(at: int, number: int) -> Callable[[list[int]], list[int]]:
    return lambda layout: [*layout[:at], number, *layout[at + 1 :]]


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_fits_is_taken(isa: str, operator: str, weight_dtype: torch.dtype) -> None:
    assert call(operator, good(operator, weight_dtype)).isfinite().all()


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("name", ["values", "where", "bias", "scales"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_of_the_layout(isa: str, operator: str, name: str, weight_dtype: torch.dtype) -> None:
    """One entry too few or too many, the wrong dtype, gaps or repetitions in memory."""
    given, name = good(operator, weight_dtype), where(operator) if name == "where" else name
    right = given[name]
    if right is None:
        right = torch.ones(10)
        refused(operator, {**given, name: right}, "values .* do not fit")
        return
    strided = torch.stack([right, right], -1)[..., 0]
    repeated = right.flatten()[:1].expand(right.numel()).view(right.shape)
    wrong = [
        right[1:],
        right[:0],
        torch.cat([right, right[:1]]),
        right.double(),
        right.half(),
        right.bool(),
        strided,
        repeated,
    ]
    for each in wrong:
        refused(operator, {**given, name: each}, f"{name} .* do not fit")
    other = torch.float32 if weight_dtype == torch.int8 else torch.int8
    if name == "values":
        refused(operator, {**given, "values": good(operator, other)["values"]}, "values .* do not fit")
    if name == "scales":
        refused(operator, {**given, "scales": None}, "values .* do not fit")


@pytest.mark.parametrize("operator", OPERATORS)
def test_numbers_of_the_layout(isa: str, operator: str) -> None:
    given = good(operator)
    right, shape = given["numbers"], 3 if operator == "gemv_linear" else 4
    for wrong in ([], right[:-1], [*right, 1]):
        refused(operator, {**given, "numbers": wrong}, "layout")
    for n, m in ((0, 4), (5, 4), (2, 0), (2, -4), (2, 65), (-1, 4)):
        refused(operator, {**given, "numbers": [n, m, *right[2:]]}, "1 <= N <= M <= 64|no layout for GEMV")
    for at in (shape, shape + 1):
        for number in (0, -8, right[at] - 1 if at == shape else right[at] - 4, right[at] + 4, 2**40):
            refused(
                operator,
                {**given, "numbers": put(at, number)(right)},
                "do not fit|makes no layout|input .* needed|inputs of each",
            )
    lanes_at = shape - 1
    for number in (0, -8, right[lanes_at] * 2, 2**40):
        refused(operator, {**given, "numbers": put(lanes_at, number)(right)}, "another instruction set|makes no layout")
    if operator != "gemv_linear":
        for tile in (0, -4, 2, 4, 7, right[2] + 1, 2**20):
            refused(operator, {**given, "numbers": put(2, tile)(right)}, "makes no layout|do not fit|offset 2 ")


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("operator", ["gemm_linear", "gemm_conv2d"])
def test_offsets_outside_their_tile(isa: str, operator: str, weight_dtype: torch.dtype) -> None:
    given = good(operator, weight_dtype)
    row = given["numbers"][3] * (2 if weight_dtype == torch.int8 else 4)
    for at in (0, 57, len(given["offsets"]) - 2):
        for wrong in (24 * row, 2**16 - row, 2**16 - 1, 1, row - 1):
            offsets = given["offsets"].clone()
            offsets[at] = wrong - 2**16 if wrong >= 2**15 else wrong
            refused(operator, {**given, "offsets": offsets}, f"offset {at} .* {wrong}")


@pytest.mark.parametrize("operator", ["gemm_linear", "gemm_conv2d"])
def test_offsets_that_change_are_looked_at_again(isa: str, operator: str) -> None:
    given = good(operator)
    expected = call(operator, given)
    for _ in range(2):
        assert torch.equal(call(operator, given), expected)
    given["offsets"][3] += 1
    refused(operator, given, "offset 3")
    given["offsets"][3] -= 1
    assert torch.equal(call(operator, given), expected)


def test_offsets_of_the_last_tile_have_fewer_inputs(isa: str) -> None:
    weight = torch.ones(3, 200) * torch.tensor([1, 1, 0, 0] * 50)
    layout = Gemm.pack(weight, None, Pattern(2, 4), kernels.vectors())
    tile = layout.numbers.tile
    assert tile < 200
    assert 200 % tile
    last = len(layout.offsets) - 2
    offsets = layout.offsets.clone()
    wrong = (tile - 1) * layout.numbers.columns * 4  # within a whole tile
    offsets[last] = wrong - 2**16 if wrong >= 2**15 else wrong
    given = {
        "values": layout.values,
        "offsets": offsets,
        "scales": None,
        "bias": None,
        "numbers": layout.integers,
        "relu": False,
    }
    refused("gemm_linear", {**given, "x": torch.ones(1, 200)}, f"offset {last}")


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_any_indices_of_gemv_stay_inside_the_window(isa: str, weight_dtype: torch.dtype) -> None:
    """Instructions look at no more bits than a window has inputs."""
    given = good("gemv_linear", weight_dtype)
    indices = torch.randint(-(2**31), 2**31, given["indices"].shape, dtype=torch.int32)
    assert call("gemv_linear", {**given, "indices": indices}).isfinite().all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs(isa: str, operator: str) -> None:
    given = good(operator)
    x = given["x"]
    for wrong in (x.double(), x.half(), x.int(), x[:, 2:], torch.tensor(1.0), torch.ones(3, 25)):
        refused(operator, {**given, "x": wrong}, "input")
    if operator == "gemm_conv2d":
        for shape in ((6,), (6, 5, 4), (1, 2, 6, 5, 4), (2, 0, 5, 4), (2, 12, 5, 4), (2, 6, 2, 4), (2, 6, 0, 4)):
            refused(operator, {**given, "x": torch.ones(shape)}, "input")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"kernel": [3]}, "kernel"),
        ({"kernel": []}, "kernel"),
        ({"kernel": [3, 1, 1]}, "kernel"),
        ({"kernel": [1, 1]}, "kernel"),
        ({"kernel": [-3, -1]}, "kernel"),
        ({"kernel": [0, 0]}, "kernel"),
        ({"stride": [0, 1]}, "stride"),
        ({"stride": [1, -1]}, "stride"),
        ({"stride": [1]}, "stride"),
        ({"padding": [-1, 0]}, "padding"),
        ({"padding": [0]}, "padding"),
        ({"dilation": [0, 1]}, "dilation"),
        ({"dilation": [1, -1]}, "dilation"),
        ({"dilation": [1, 1, 1]}, "dilation"),
        ({"groups": 0}, "groups"),
        ({"groups": -1}, "groups"),
        ({"groups": 3}, "groups"),
        ({"groups": 4}, "groups"),
        ({"dilation": [3, 1]}, "smaller than the kernel"),
    ],
)
def test_geometry(isa: str, wrong: Given, complaint: str) -> None:
    refused("gemm_conv2d", {**good("gemm_conv2d"), **wrong}, complaint)


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_elsewhere(isa: str, operator: str) -> None:
    given = good(operator)
    for name in ("x", "values", where(operator), "bias"):
        refused(operator, {**given, name: given[name].to("meta")}, "on cpu, meta; needed one device")


numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**31 - 1, 2**32, -(2**31), 2**62])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), operator=st.sampled_from(OPERATORS), weight_dtype=st.sampled_from(WEIGHT_DTYPES))
def test_any_numbers_give_a_result_or_an_exception(
    isa: str, data: st.DataObject, operator: str, weight_dtype: torch.dtype
) -> None:
    """Some of the integers that describe a product replaced by any others."""
    given = good(operator, weight_dtype)
    lists = [name for name, each in given.items() if isinstance(each, list)]
    for name in data.draw(st.lists(st.sampled_from(lists), min_size=1, max_size=3), label="changed"):
        at = data.draw(st.integers(0, len(given[name]) - 1), label="at")
        given[name] = put(at, data.draw(numbers, label="to"))(given[name])
    if operator == "gemm_conv2d":
        given["groups"] = data.draw(st.sampled_from([1, 1, given["groups"], 2, 0, -1, 2**32 + 1]), label="groups")
    if max(abs(number) for number in given.get("padding", [0])) > 1000:
        return  # a result of so many zeros does not fit the memory
    try:
        y = call(operator, given)
    except (ValueError, TypeError, RuntimeError):
        return
    assert y.isfinite().all()
