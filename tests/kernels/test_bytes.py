"""Products of bytes against plain loops in numpy: the same numbers to the last bit, wherever rounding is defined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import openwork.kernels as kernels
from openwork.layouts import DotProduct
from openwork.layouts.conv import conv_rows
from openwork.layouts.layout import Vectors
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops import bytes as reference
from openwork.ops.bytes import GELU, RELU, Form

ops = torch.ops.openwork
needs_dot_product = pytest.mark.skipif(not kernels.vectors().dot_product, reason="needs AVX-512 with VBMI and VNNI")
P24 = Pattern(2, 4)


def fma(a: Any, b: Any, c: Any) -> Any:
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def finished(sums: Any, outputs: list[Any], residual: Any, form: Form) -> Any:
    """The rule of openwork/ops/bytes.py, for sums (..., O)."""
    y = fma(sums.astype(np.float32), outputs[0], outputs[1])
    if residual is not None and residual.dtype == np.uint8:
        y = fma(residual.astype(np.float32) - form.residual_zero, np.float32(form.residual_scale), y)
    elif residual is not None:
        y = y + residual
    if form.activation == RELU:
        y = np.maximum(y, 0)
    if form.activation == GELU:
        y = F.gelu(torch.from_numpy(y).double()).float().numpy()
    return as_bytes(y, form.y_scale, form.y_zero) if form.y_scale else y


def as_bytes(y: Any, scale: float, zero: int) -> Any:
    return np.clip(np.rint(fma(y, np.float32(1 / scale), zero)), 0, 255).astype(np.uint8)


class Layer:
    """A weight of whole numbers, as dense (O, C, R, S) or (O, K) and as kernels take it."""

    def __init__(self, shape: tuple[int, ...], pattern: Pattern = P24, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, shape, generator=self.random).float()
        rows = conv_rows(weight, pattern) if len(shape) == 4 else F.pad(weight, (0, -shape[1] % pattern.m))
        rows = apply_mask(rows, magnitude_mask(rows.abs(), pattern, Axis(1)))
        rows = rows if len(shape) == 4 else rows[:, : shape[1]]
        self.rows, self.shape, O = rows, shape, shape[0]
        here = kernels.vectors() if kernels.vectors().dot_product else Vectors(lanes=16)
        self.layout = DotProduct.pack(rows.to(torch.int8), torch.ones(O), pattern, here)
        scales = torch.rand(O, generator=self.random) * 1e-3 + 1e-4
        bias = torch.randn(O, generator=self.random)
        self.outputs = [scales, bias, rows.sum(1).to(torch.int32)]

    def bytes(self, *shape: int) -> Tensor:
        x = torch.randint(0, 256, shape, generator=self.random).to(torch.uint8)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x

    def linear(self, x: Tensor, residual: Tensor | None, form: Form, by: Any = ops) -> Tensor:
        return by.bytes_linear(x, self.layout.tensors(), self.outputs, self.layout.integers, residual, *form.arguments)

    def conv(self, x: Tensor, residual: Tensor | None, form: Form, geometry: list[int], by: Any = ops) -> Tensor:
        given = (x, self.layout.tensors(), self.outputs, self.layout.integers, residual, *form.arguments, geometry)
        return by.bytes_conv2d(*given)

    def numpy(self) -> list[Any]:
        return [each.numpy() for each in self.outputs]


def expected_conv(layer: Layer, x: Tensor, residual: Tensor | None, form: Form, geometry: list[int]) -> Any:
    """One output pixel at a time; outside of the image every byte is the zero point."""
    (R, S), (up, left), (high, wide), (down, right) = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    O, C = layer.shape[:2]
    rows = layer.rows.view(O, R, S, -1)[..., :C].numpy().astype(np.int64)
    image = np.pad(
        x.permute(0, 2, 3, 1).numpy(), ((0, 0), (high, high), (wide, wide), (0, 0)), constant_values=form.zero
    )
    whole = image.astype(np.int64) - form.zero
    H = (whole.shape[1] - down * (R - 1) - 1) // up + 1
    W = (whole.shape[2] - right * (S - 1) - 1) // left + 1
    sums = np.zeros((len(x), H, W, O), np.int64)
    for i in range(H):
        for j in range(W):
            for r in range(R):
                for s in range(S):
                    sums[:, i, j] += whole[:, i * up + r * down, j * left + s * right] @ rows[:, r, s].T
    added = None if residual is None else residual.permute(0, 2, 3, 1).numpy()
    return finished(sums, layer.numpy(), added, form).transpose(0, 3, 1, 2)


FORMS = [
    Form(zero=0, y_scale=0.05, y_zero=0, activation=RELU),
    Form(zero=128, y_scale=0.02, y_zero=131),
    Form(zero=77),
    Form(zero=255, activation=RELU),
]


@needs_dot_product
@pytest.mark.parametrize("residual", [None, "bytes", "floats"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 8, 64, 16), (1, 1, 64, 5), (3, 7, 200, 37), (2, 13, 130, 64)])
def test_linear(shape: tuple[int, ...], form: Form, residual: str | None) -> None:
    *rows, K, O = shape
    for pattern in (P24, Pattern(1, 4), Pattern(1, 16), Pattern(4, 4)):
        layer = Layer((O, K), pattern)
        x, added = layer.bytes(*rows, K), None
        if residual == "bytes":
            added, form = layer.bytes(*rows, O), form._replace(residual_scale=0.03, residual_zero=9)
        elif residual == "floats":
            added = torch.randn(*rows, O, generator=layer.random)
        sums = (x.numpy().astype(np.int64) - form.zero) @ layer.rows.numpy().astype(np.int64).T
        expected = finished(sums, layer.numpy(), None if added is None else added.numpy(), form)
        found = layer.linear(x, added, form)
        assert found.dtype == (torch.uint8 if form.y_scale else torch.float32)
        np.testing.assert_array_equal(found.numpy(), expected)
        np.testing.assert_array_equal(layer.linear(x, added, form, reference).numpy(), expected)


GEOMETRIES = [  # kernel, stride, padding, dilation, groups
    [1, 1, 1, 1, 0, 0, 1, 1, 1],
    [1, 1, 2, 2, 0, 0, 1, 1, 1],
    [3, 3, 1, 1, 1, 1, 1, 1, 1],
    [3, 2, 2, 1, 2, 1, 1, 2, 1],
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
]


@needs_dot_product
@pytest.mark.parametrize("residual", [None, "bytes", "floats"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("N", "C", "O"), [(1, 64, 64), (3, 20, 19), (2, 6, 70), (0, 8, 16)])
def test_conv2d(N: int, C: int, O: int, geometry: list[int], form: Form, residual: str | None) -> None:
    layer = Layer((O, C, *geometry[:2]))
    x, added = layer.bytes(N, C, 6, 7), None
    shape = layer.conv(x, None, form, geometry).shape
    if residual == "bytes":
        added, form = layer.bytes(*shape), form._replace(residual_scale=0.03, residual_zero=200)
    elif residual == "floats":
        added = torch.randn(shape, generator=layer.random)
    found = layer.conv(x, added, form, geometry)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = expected_conv(layer, x, added, form, geometry)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(layer.conv(x, added, form, geometry, reference).numpy(), expected)


@needs_dot_product
def test_an_image_in_another_order_gives_the_same() -> None:
    layer, form = Layer((19, 20, 3, 3)), FORMS[1]
    x = layer.bytes(2, 20, 6, 6)
    expected = layer.conv(x, None, form, GEOMETRIES[2])
    residual = layer.bytes(*expected.shape)
    torch.testing.assert_close(layer.conv(x.contiguous(), None, form, GEOMETRIES[2]), expected, rtol=0, atol=0)
    both = [layer.conv(x, each, form, GEOMETRIES[2]) for each in (residual, residual.contiguous())]
    torch.testing.assert_close(*both, rtol=0, atol=0)


@needs_dot_product
def test_gelu_is_within_a_rounding_of_the_exact_one() -> None:
    layer = Layer((64, 256))
    x = layer.bytes(50, 256)
    floats = layer.linear(x, None, Form(zero=100, activation=GELU))
    exact = layer.linear(x, None, Form(zero=100))
    expected = F.gelu(exact.double())
    assert float(exact.min()) < -6
    assert float(exact.max()) > 6
    assert bool(((floats - expected).abs() <= 4e-7 * exact.abs().clamp(min=1)).all())
    bytes_ = layer.linear(x, None, Form(zero=100, activation=GELU, y_scale=0.03, y_zero=6))
    apart = np.abs(bytes_.numpy().astype(int) - as_bytes(expected.float().numpy(), 0.03, 6))
    assert apart.max() <= 1
    assert apart.mean() < 1e-3


@needs_dot_product
def test_outputs_saturate_and_what_is_not_a_number_is_nothing() -> None:
    layer = Layer((16, 64))
    layer.outputs[0].fill_(1.0)
    layer.outputs[1].copy_(torch.tensor([torch.nan, torch.inf, -torch.inf, *[0.0] * 13]))
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    found = layer.linear(x, None, Form(y_scale=1e-3, y_zero=7))[0].tolist()
    sums = layer.rows.sum(1)[3:]
    assert found[:3] == [0, 255, 0]
    assert found[3:] == [255 if each > 0 else 0 for each in sums.tolist()]


@needs_dot_product
def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0, torch.nan])
    for by in (ops, reference):
        assert by.to_bytes(x, 1.0, 0).tolist() == [0, 2, 2, 0, 0, 255, 0, 0]
        assert by.to_bytes(x, 1.0, 100).tolist() == [100, 102, 102, 100, 98, 255, 0, 0]


@needs_dot_product
@pytest.mark.parametrize("shape", [(0,), (1,), (33,), (2, 5, 3, 3), (0, 4, 2, 2)])
def test_there_and_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = ops.to_bytes(x, 0.02, 120)
    np.testing.assert_array_equal(whole.numpy(), as_bytes(x.numpy(), 0.02, 120))
    torch.testing.assert_close(whole, reference.to_bytes(x, 0.02, 120), rtol=0, atol=0)
    back = ops.from_bytes(whole, 0.02, 120)
    torch.testing.assert_close(back, reference.from_bytes(whole, 0.02, 120), rtol=0, atol=0)
    if len(shape) == 4:
        assert whole.is_contiguous(memory_format=torch.channels_last)
        assert back.is_contiguous(memory_format=torch.channels_last)


@needs_dot_product
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_it(threads: int) -> None:
    layer, form, before = Layer((48, 64, 3, 3)), FORMS[1], torch.get_num_threads()
    x = layer.bytes(2, 64, 20, 20)
    try:
        torch.set_num_threads(threads)
        found = layer.conv(x, None, form, GEOMETRIES[2])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, layer.conv(x, None, form, GEOMETRIES[2], reference), rtol=0, atol=0)


def test_compilers_are_told_what_comes_out() -> None:
    layer, form = Layer((16, 64)), FORMS[1]
    rest = (layer.layout.tensors(), layer.outputs, layer.layout.integers)
    torch.library.opcheck(ops.bytes_linear.default, (layer.bytes(3, 64), *rest, None, *form.arguments))
    conv, x = Layer((16, 8, 3, 3)), layer.bytes(2, 8, 5, 5)
    rest = (conv.layout.tensors(), conv.outputs, conv.layout.integers)
    torch.library.opcheck(ops.bytes_conv2d.default, (x, *rest, None, *form.arguments, GEOMETRIES[2]))
    torch.library.opcheck(ops.to_bytes.default, (torch.randn(2, 3, 4, 4), 0.1, 3))
    torch.library.opcheck(ops.from_bytes.default, (x, 0.1, 3))


@needs_dot_product
def test_what_does_not_fit_is_refused() -> None:
    layer, form = Layer((16, 64)), FORMS[1]
    x = layer.bytes(3, 64)
    with pytest.raises(ValueError, match="needed uint8"):
        layer.linear(x.float(), None, form)
    with pytest.raises(ValueError, match=r"residual \(3, 15\) of torch\.uint8"):
        layer.linear(x, layer.bytes(3, 15), form)
    with pytest.raises(ValueError, match=r"residual .* of torch\.float64"):
        layer.linear(x, torch.zeros(3, 16).double(), form)
    with pytest.raises(ValueError, match="zero points"):
        layer.linear(x, None, form._replace(zero=256))
    with pytest.raises(ValueError, match="activation"):
        layer.linear(x, None, form._replace(activation=3))
    layer.outputs[2] = layer.outputs[2][:5]
    with pytest.raises(ValueError, match=r"sums \(5,\)"):
        layer.linear(x, None, form)
    with pytest.raises(ValueError, match="float32"):
        ops.to_bytes(x, 0.1, 0)
    with pytest.raises(ValueError, match=r"scale 0\.0"):
        ops.to_bytes(x.float(), 0.0, 0)
