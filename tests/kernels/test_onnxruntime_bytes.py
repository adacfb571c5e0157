"""The operators of ONNX Runtime on bytes: the bits of the products that torch's int8 network calls, and refusals."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import openwork.kernels as kernels
from openwork.kernels.cpu import native, onnxruntime_operators
from openwork.layouts import DotProduct
from openwork.layouts.conv import ConvGeometry, conv_rows
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight
from openwork.ops.bytes import GELU, NONE, RELU, Form

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from one_operator import model, session, sparse

pytestmark = pytest.mark.skipif(
    native.library() is None or not onnxruntime_operators._FILE.exists() or not kernels.vectors().dot_product,
    reason="needs the native libraries, and AVX-512 with VBMI and VNNI",
)
ops = torch.ops.openwork
FLOAT, BYTES = 1, 2  # as ONNX numbers them
FORM = Form(7, 9, 100, NONE, 0.03, 0.05)  # what `model` writes of zero points and scales
X_SCALE = 0.02


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def quantized(shape: tuple[int, ...], pattern: str) -> tuple[Tensor, Tensor]:
    """A weight in int8 and the scale of each output."""
    numbers, scales = quantize_weight(sparse(shape, pattern), torch.int8)
    assert scales is not None
    return numbers, scales


def packed(rows: Tensor, scales: Tensor, pattern: str, bias: Tensor | None) -> tuple[Any, ...]:
    """The weight as torch's operators on bytes take it."""
    layout = DotProduct.pack(rows, scales, Pattern.parse(pattern), native.vectors())
    outputs = [scales * X_SCALE, torch.zeros(len(rows)) if bias is None else bias, rows.sum(1, dtype=torch.int32)]
    return layout.tensors(), outputs, layout.integers


def run(file: Any, x: Tensor, added: Tensor | None = None, threads: int = 1) -> Tensor:
    feed = {"x": x.numpy()} | ({} if added is None else {"added": added.numpy()})
    return torch.from_numpy(session(file, threads).run(None, feed)[0])


@pytest.mark.parametrize("to_float", [False, True])
@pytest.mark.parametrize(
    ("pattern", "O", "K", "activation"),
    [
        ("2:4", 33, 64, NONE),
        ("1:4", 100, 50, RELU),
        ("1:8", 40, 130, GELU),
        ("4:4", 16, 70, NONE),
        ("1:16", 7, 20, RELU),
    ],
)
def test_linear_is_bit_for_bit_what_torch_calls(pattern, O, K, activation, to_float):
    numbers, scales = quantized((O, K), pattern)
    bias = torch.randn(O)
    weight, outputs, integers = packed(numbers, scales, pattern, bias)
    form = FORM._replace(activation=activation, **({"y_scale": 0.0, "y_zero": 0} if to_float else {}))
    op, y_dtype = ("QSparseLinearToFloat", FLOAT) if to_float else ("QSparseLinear", BYTES)
    given = {"scales": scales.numpy(), "activation": activation, "dtype": BYTES, "y_dtype": y_dtype}
    for rows, residual in ((1, None), (30, torch.randn(30, O)), (400, random_bytes(400, O))):
        x = random_bytes(rows, K)
        whole, reals = form.arguments
        expected = ops.bytes_linear(x, weight, outputs, integers, residual, whole, reals)
        added = None if residual is None else ["b", O]
        added_dtype = BYTES if residual is not None and residual.dtype == torch.uint8 else FLOAT
        file = model(op, numbers, pattern, bias, ["b", K], added=added, added_dtype=added_dtype, **given)
        for threads in (1, 3):
            found = run(file, x, residual, threads)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    file = model(op, numbers, pattern, bias, [2, "b", K], **given)
    assert run(file, random_bytes(2, 0, K)).shape == (2, 0, O)


@pytest.mark.parametrize("to_float", [False, True])
@pytest.mark.parametrize(
    ("shape", "stride", "padding", "dilation", "image"),
    [
        ((20, 8, 3, 3), (1, 1), (1, 1), (1, 1), (2, 9, 10)),
        ((8, 3, 3, 2), (2, 1), (2, 1), (1, 2), (3, 11, 10)),  # channels are filled up
        ((16, 64, 1, 1), (1, 1), (0, 0), (1, 1), (40, 7, 7)),
        ((16, 64, 1, 1), (2, 2), (0, 0), (1, 1), (1, 7, 7)),
    ],
)
def test_convolutions_are_bit_for_bit_what_torch_calls(shape, stride, padding, dilation, image, to_float):
    numbers, scales = quantized(shape, "2:4")
    bias, conv = torch.randn(shape[0]), ConvGeometry(shape[2:], stride, padding, dilation, 1)
    weight, outputs, integers = packed(conv_rows(numbers, Pattern(2, 4)), scales, "2:4", bias)
    form = FORM._replace(activation=RELU, **({"y_scale": 0.0, "y_zero": 0} if to_float else {}))
    op, y_dtype = ("QSparseConv2dToFloat", FLOAT) if to_float else ("QSparseConv2d", BYTES)
    given = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "scales": scales.numpy()}
    given |= {"activation": RELU, "dtype": BYTES, "y_dtype": y_dtype}
    x = random_bytes(image[0], shape[1], *image[1:])
    high, wide = conv.output_size(*image[1:])
    for residual in (None, random_bytes(image[0], shape[0], high, wide), torch.randn(image[0], shape[0], high, wide)):
        expected = ops.bytes_conv2d(x, weight, outputs, integers, residual, *form.arguments, conv.numbers)
        last = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
        added_dtype = FLOAT if residual is None or residual.is_floating_point() else BYTES
        added = None if residual is None else [None] * 4
        file = model(op, numbers, "2:4", bias, [None] * 4, added=added, added_dtype=added_dtype, **given)
        for threads in (1, 3):
            found = run(file, x.permute(0, 2, 3, 1).contiguous(), last, threads)
            assert torch.equal(found.permute(0, 3, 1, 2), expected)


def test_padding_that_differs_from_side_to_side():
    numbers, scales = quantized((8, 8, 3, 3), "1:4")
    given = {"scales": scales.numpy(), "dtype": BYTES, "y_dtype": FLOAT, "x_zero_point": 0, "x_scale": 1.0}
    x = random_bytes(2, 9, 10, 8)
    file = model("QSparseConv2dToFloat", numbers, "1:4", None, [None] * 4, pads=[0, 1, 2, 3], **given)
    images = torch.nn.functional.pad(x.permute(0, 3, 1, 2).float(), (1, 3, 0, 2))
    expected = torch.nn.functional.conv2d(images, numbers.float()) * scales[:, None, None]
    torch.testing.assert_close(run(file, x).permute(0, 3, 1, 2), expected)


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "an activation of 3": ("QSparseLinear", {"activation": 3}, "activation = 3; needed 0 to 2"),
    "a negative activation": ("QSparseLinear", {"activation": -1}, "activation = -1"),
    "a zero point of 256": ("QSparseLinear", {"x_zero_point": 256}, "x_zero_point = 256; needed 0 to 255"),
    "a huge zero point": ("QSparseLinear", {"y_zero_point": 2**40}, "y_zero_point = .*; needed 0 to 255"),
    "no scale of x": ("QSparseLinear", {"x_scale": None}, "x_scale"),
    "a scale of 0": ("QSparseLinear", {"y_scale": 0.0}, "y_scale = .*; needed a number above 0"),
    "a negative scale": ("QSparseConv2d", {"x_scale": -1.0}, "x_scale = .*; needed a number above 0"),
    "an infinite scale": ("QSparseConv2d", {"y_scale": float("inf")}, "y_scale = inf"),
    "a scale that is none": ("QSparseConv2d", {"y_scale": float("nan")}, "y_scale = nan|y_scale = -nan"),
    "no scale of what is added": ("QSparseLinear", {"added_scale": None, "added": [None] * 2}, "added_scale"),
    "values in float32": ("QSparseLinear", {"values": np.ones((8, 8), np.float32)}, "[Tt]ype"),
    "no scales": ("QSparseLinear", {"scales": None}, "scales has to be|invalid|input"),
    "few scales": ("QSparseLinear", {"scales": np.ones(7, np.float32)}, r"scales \(7\); needed \(8\)"),
    "few indices": ("QSparseConv2d", {"indices": np.zeros(15, np.uint8)}, "this weight has"),
    "indices that do not ascend": ("QSparseLinear", {"indices": np.zeros(16, np.uint8)}, "ascending"),
    "a pattern without a kernel": ("QSparseLinear", {"pattern": "3:7"}, "dot products do not take int8 at 3:7"),
    "half a step": ("QSparseLinear", {"pattern": "1:32"}, "dot products do not take int8 at 1:32"),
    "a shape of three": ("QSparseLinear", {"shape": [8, 16, 1]}, "buffer|needed 2"),
    "a huge kernel": ("QSparseConv2d", {"shape": [8, 16, 2**31 - 1, 2**31 - 1]}, "weight"),
    "a stride of zero": ("QSparseConv2d", {"strides": [0, 1]}, "strides"),
    "negative pads": ("QSparseConv2d", {"pads": [-1, 0, 0, 0]}, "pads"),
    "data in float32": ("QSparseLinear", {"dtype": FLOAT}, "[Tt]ype"),
    "data in int8": ("QSparseConv2d", {"dtype": 3}, "[Tt]ype"),
    "an output in float32": ("QSparseLinear", {"y_dtype": FLOAT}, "[Tt]ype"),
    "an output in bytes": ("QSparseLinearToFloat", {"y_dtype": BYTES}, "[Tt]ype"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_when_a_session_is_made(name):
    op, changed, message = HOSTILE[name]
    changed = {"dtype": BYTES, "y_dtype": BYTES, **changed}
    pattern = changed.pop("pattern", "2:4")
    numbers, scales = quantized((8, 16, 3, 3) if "Conv2d" in op else (8, 28 if pattern == "3:7" else 16), pattern)
    changed = {"scales": scales.numpy(), **changed}
    with pytest.raises(Exception, match=message):
        session(model(op, numbers, pattern, None, [None] * numbers.ndim, **changed))


def test_sums_that_exceed_32_bits_are_refused():
    most = 2**31 // (255 * 127)
    for length, refused in ((most, False), (most + 4, True)):
        weight = torch.full((1, length), 127, dtype=torch.int8)
        given = {"scales": np.ones(1, np.float32), "dtype": BYTES, "y_dtype": FLOAT}
        file = model("QSparseLinearToFloat", weight, "4:4", None, [1, length], x_zero_point=0, x_scale=1.0, **given)
        if refused:
            with pytest.raises(Exception, match="output 0 may add up to more than 32 bits"):
                session(file)
        else:
            x = torch.full((1, length), 255, dtype=torch.uint8)
            assert run(file, x).item() == float(np.float32(length * 127 * 255))


def test_inputs_that_do_not_fit_are_refused_when_it_runs():
    numbers, scales = quantized((8, 16), "2:4")
    given = {"scales": scales.numpy(), "dtype": BYTES, "y_dtype": BYTES}
    linear = session(model("QSparseLinear", numbers, "2:4", None, [None] * 2, added=[None] * 2, **given))
    for x, added in (((2, 8), (2, 8)), ((2, 16), (2, 7)), ((2, 16), (1, 8)), ((2, 16), (0, 0))):
        with pytest.raises(Exception, match=r"needed|the output has"):
            linear.run(None, {"x": np.zeros(x, np.uint8), "added": np.zeros(added, np.float32)})
    numbers, scales = quantized((8, 8, 3, 3), "2:4")
    conv = session(model("QSparseConv2d", numbers, "2:4", None, [None] * 4, **{**given, "scales": scales.numpy()}))
    for shape in ((1, 9, 9, 7), (1, 2, 9, 8)):
        with pytest.raises(Exception, match="input"):
            conv.run(None, {"x": np.zeros(shape, np.uint8)})
    other = model(
        "QSparseLinear", *quantized((8, 16), "2:4")[:1], "2:4", None, [None] * 2, added=[2, 8], added_dtype=7, **given
    )
    with pytest.raises(Exception, match="added"):
        session(other).run(None, {"x": np.zeros((2, 16), np.uint8), "added": np.zeros((2, 8), np.int64)})


def test_a_processor_without_dot_products_is_told(monkeypatch: pytest.MonkeyPatch):
    numbers, scales = quantized((8, 16), "2:4")
    file = model("QSparseLinear", numbers, "2:4", None, [None] * 2, scales=scales.numpy(), dtype=BYTES, y_dtype=BYTES)
    monkeypatch.setenv("OPENWORK_ISA", "avx2")
    with pytest.raises(Exception, match="no dot products of bytes"), warnings.catch_warnings():
        session(file)
