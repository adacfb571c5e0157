"""The operators of ONNX Runtime: the bits of our own kernels, refusals when a session is made, no torch needed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import openwork as ow
from openwork.kernels.cpu import native, onnxruntime_operators
from openwork.layouts import DotProduct, Gemm, Gemv
from openwork.layouts.conv import ConvGeometry, conv_rows
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import quantize_weight

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from one_operator import model, ran, session, sparse

pytestmark = pytest.mark.skipif(
    native.library() is None or not onnxruntime_operators._FILE.exists(), reason="needs the native libraries"
)


@pytest.mark.parametrize(
    ("pattern", "O", "K"),
    [
        ("2:4", 33, 64),
        ("1:4", 700, 50),
        ("1:8", 40, 64),
        ("3:7", 20, 40),
        ("32:64", 17, 128),
        ("2:32", 17, 70),
        ("1:2", 9, 7),
    ],
)
def test_linear_is_bit_for_bit_what_our_kernels_give(pattern, O, K):
    weight, bias = sparse((O, K), pattern), torch.randn(O)
    for rows, leading in ((1, [1]), (16, ["b"]), (17, ["b"]), (6, [2, "b"]), (300, ["b"])):
        x = torch.randn(rows, K)
        few = rows <= 16 and Pattern.parse(pattern).m in (2, 4, 8, 16, 32)
        layout = (Gemv if few else Gemm).pack(weight, None, Pattern.parse(pattern), native.vectors())
        shaped = x.view(2, -1, K) if len(leading) == 2 else x
        for relu in (0, 1):
            y = ran(model("SparseLinear", weight, pattern, bias, [*leading, K], relu=relu), shaped)
            assert torch.equal(y, layout.linear(shaped, bias, bool(relu)))
    torch.testing.assert_close(y, F.linear(x, weight, bias).relu(), atol=1e-4, rtol=1e-4)
    assert ran(model("SparseLinear", weight, pattern, None, ["b", K]), torch.randn(0, K)).shape == (0, O)


@pytest.mark.parametrize(
    ("shape", "groups", "stride", "padding", "dilation", "image"),
    [
        ((8, 8, 3, 3), 1, (1, 1), (1, 1), (1, 1), (2, 9, 10)),
        ((8, 6, 3, 3), 2, (2, 1), (2, 1), (1, 2), (2, 11, 10)),
        ((16, 64, 1, 1), 1, (1, 1), (0, 0), (1, 1), (1, 7, 7)),
        ((8, 8, 5, 1), 1, (1, 1), (2, 0), (1, 1), (1, 30, 1)),
    ],
)
def test_convolutions_are_bit_for_bit_what_our_kernels_give(shape, groups, stride, padding, dilation, image):
    weight, bias = sparse(shape, "2:4"), torch.randn(shape[0])
    x = torch.randn(image[0], shape[1] * groups, *image[1:])
    given = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups, "relu": 1}
    layout = Gemm.pack(conv_rows(weight, Pattern(2, 4)), None, Pattern(2, 4), native.vectors())
    expected = layout.conv2d(x, bias, ConvGeometry(shape[2:], stride, padding, dilation, groups), True)
    for threads in (1, 3):
        assert torch.equal(ran(model("SparseConv2d", weight, "2:4", bias, [None] * 4, **given), x, threads), expected)


def test_int8_is_bit_for_bit_what_our_kernels_give():
    pattern, bias = Pattern(2, 4), torch.randn(33)
    weight, scales = quantize_weight(sparse((33, 50), "2:4"), torch.int8)
    dots = native.vectors().dot_product
    for rows, kind in ((1, Gemv), (16, Gemv), (17, Gemm), (130, Gemm), (700, Gemm)):
        x, kind = torch.randn(rows, 50), DotProduct if dots else kind
        expected = kind.pack(weight, scales, pattern, native.vectors()).linear(x, bias, True)
        file = model("SparseLinear", weight, "2:4", bias, ["b", 50], relu=1, scales=scales.numpy())
        assert torch.equal(ran(file, x), expected)
    x[3, 5] = torch.nan
    assert ran(file, x).isnan().any(1).nonzero().tolist() == [[3]]


def test_int8_convolutions_are_bit_for_bit_what_our_kernels_give():
    weight, scales = quantize_weight(sparse((8, 8, 3, 3), "1:4"), torch.int8)
    x = torch.randn(3, 8, 30, 90)
    layout = Gemm.pack(conv_rows(weight, Pattern(1, 4)), scales, Pattern(1, 4), native.vectors())
    expected = layout.conv2d(x, None, ConvGeometry((3, 3), (1, 1), (0, 0), (1, 1), 1), False)
    for threads in (1, 3):
        file = model("SparseConv2d", weight, "1:4", None, [None] * 4, scales=scales.numpy())
        assert torch.equal(ran(file, x, threads), expected)


def test_padding_that_differs_from_side_to_side():
    weight, x = sparse((8, 8, 3, 3), "1:4"), torch.randn(2, 8, 9, 10)
    y = ran(model("SparseConv2d", weight, "1:4", None, [None] * 4, pads=[0, 1, 2, 3]), x)
    torch.testing.assert_close(y, F.conv2d(F.pad(x, (1, 3, 0, 2)), weight), atol=1e-4, rtol=1e-4)


def test_what_a_convolution_adds():
    weight, bias, x = sparse((8, 16, 3, 3), "2:4"), torch.randn(8), torch.randn(2, 16, 40, 30)
    added = torch.randn(2, 8, 38, 28)
    for relu, threads in ((0, 1), (1, 3)):
        plain = ran(model("SparseConv2d", weight, "2:4", bias, [None] * 4), x)
        file = model("SparseConv2d", weight, "2:4", bias, [None] * 4, added=[None] * 4, relu=relu)
        made = session(file, threads)
        y = torch.from_numpy(made.run(None, {"x": x.numpy(), "added": added.numpy()})[0])
        assert torch.equal(y, (plain + added).relu() if relu else plain + added)
    for shape in ((2, 8, 38, 27), (1, 8, 38, 28), (0, 0, 0, 0)):
        with pytest.raises(Exception, match=r"added \(.*; the output has \(2, 8, 38, 28\)"):
            made.run(None, {"x": x.numpy(), "added": np.zeros(shape, np.float32)})


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "n above m": ("SparseLinear", {"n": 5}, "needed 1 <= n <= m <= 64"),
    "a huge m": ("SparseLinear", {"m": 2**62}, "needed 1 <= n <= m <= 64"),
    "no n": ("SparseLinear", {"n": None}, "n"),
    "a huge shape": ("SparseLinear", {"shape": [2**31 - 1, 2**31 - 1]}, "weight"),
    "a negative shape": ("SparseLinear", {"shape": [-8, 16]}, "shape"),
    "a shape of three": ("SparseLinear", {"shape": [8, 16, 1]}, "buffer|needed 2"),
    "a million attributes": ("SparseLinear", {"shape": [1] * 10**6}, "buffer"),
    "other values": ("SparseLinear", {"values": np.zeros((8, 7), np.float32)}, "this weight has"),
    "values of float64": ("SparseLinear", {"values": np.zeros((8, 8))}, "float32 or int8"),
    "few indices": ("SparseLinear", {"indices": np.zeros(15, np.uint8)}, "this weight has"),
    "indices that do not ascend": ("SparseLinear", {"indices": np.zeros(16, np.uint8)}, "ascending"),
    "spare slots elsewhere": (
        "SparseLinear",
        {"values": np.zeros((8, 8), np.float32), "indices": np.full(16, 0b11101110, np.uint8)},
        "lowest free",
    ),
    "a short bias": ("SparseLinear", {"bias": np.zeros(7, np.float32)}, "bias"),
    "int8 without scales": ("SparseLinear", {"values": np.ones((8, 8), np.int8)}, "scales has to be"),
    "values of int32": ("SparseLinear", {"values": np.ones((8, 8), np.int32)}, "float32 or int8"),
    "relu of 2": ("SparseLinear", {"relu": 2}, "relu"),
    "a stride of zero": ("SparseConv2d", {"strides": [0, 1]}, "strides"),
    "negative pads": ("SparseConv2d", {"pads": [-1, 0, 0, 0]}, "pads"),
    "groups that do not divide": ("SparseConv2d", {"group": 3}, "group"),
    "data in float16": ("SparseLinear", {"dtype": 10}, "[Tt]ype"),
    "data in int8": ("SparseConv2d", {"dtype": 3}, "[Tt]ype"),
    "a bias in float64": ("SparseLinear", {"bias": np.zeros(8)}, "[Tt]ype"),
    "a bias in two dims": ("SparseLinear", {"bias": np.zeros((1, 8), np.float32)}, r"bias \(1, 8\); needed \(8\)"),
    "indices in int8": ("SparseLinear", {"indices": np.zeros(16, np.int8)}, "[Tt]ype"),
    "few scales": (
        "SparseLinear",
        {"values": np.ones((8, 8), np.int8), "scales": np.ones(7, np.float32)},
        r"scales \(7\); needed \(8\)",
    ),
    "a value past the end": ("SparseLinear", {"shape": [8, 15]}, "past the end"),
    "bits after the last group": ("SparseLinear", {"shape": [1, 4]}, "this weight has"),
    "a huge kernel": ("SparseConv2d", {"shape": [8, 16, 2**31 - 1, 2**31 - 1]}, "weight"),
    "a huge dilation": ("SparseConv2d", {"dilations": [2**40, 1]}, "dilations"),
    "values that are no constant": ("SparseLinear", {"values": None}, "constant|invalid|input"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_when_a_session_is_made(name):
    op, changed, message = HOSTILE[name]
    shape = (8, 16, 3, 3) if op == "SparseConv2d" else (8, 16)
    if "indices" in changed and "values" not in changed:
        changed = {**changed, "values": np.ones((8, 8), np.float32)}
    weight = torch.ones(8, 16) * torch.tensor([0, 0, 1, 1]).repeat(4) if "past" in name else sparse(shape, "2:4")
    file = model(op, weight, "2:4", None, [None] * len(shape), **changed)
    with pytest.raises(Exception, match=message):
        session(file)


def test_inputs_of_other_shapes_are_refused_when_it_runs():
    linear = session(model("SparseLinear", sparse((8, 16), "2:4"), "2:4", None, [None, None]))
    with pytest.raises(Exception, match=r"input \(2, 8\); needed \(\.\.\., 16\)"):
        linear.run(None, {"x": np.zeros((2, 8), np.float32)})
    conv = session(model("SparseConv2d", sparse((8, 8, 3, 3), "2:4"), "2:4", None, [None] * 4))
    for shape in ((1, 7, 9, 9), (1, 8, 2, 9)):
        with pytest.raises(Exception, match="input"):
            conv.run(None, {"x": np.zeros(shape, np.float32)})
    assert linear.run(None, {"x": np.zeros((2, 16), np.float32)})[0].shape == (2, 8)


def test_sessions_in_threads_one_closed_while_another_runs():
    weight, x = sparse((256, 256), "2:4"), torch.randn(70, 256)
    file = model("SparseLinear", weight, "2:4", None, ["b", 256])
    expected, right = ran(file, x), []

    def work() -> None:
        for _ in range(5):
            own = session(file, 2)
            same = [np.array_equal(own.run(None, {"x": x.numpy()})[0], expected.numpy()) for _ in range(5)]
            right.append(all(same))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


_ALONE = """
import sys, numpy, onnxruntime
def kib(): return int(open("/proc/self/statm").read().split()[1]) * 4  # not the peak, which a process inherits
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
x = numpy.load(sys.argv[3])
run = lambda: session.run(None, {"x": x})[0]
numpy.save(sys.argv[4], run())
for _ in range(500): run()
before = kib()
for _ in range(10000): run()
grown = kib() - before
assert grown < 500, f"memory grew by {grown} KiB"
assert not {"torch", "openwork"} & set(sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux tells of a process")
def test_without_torch_and_openwork_and_without_growing(tmp_path: Path):
    weight, x = sparse((64, 64), "2:4"), torch.randn(9, 64)
    (tmp_path / "net.onnx").write_bytes(model("SparseLinear", weight, "2:4", None, ["b", 64]))
    (tmp_path / "library.so").write_bytes(Path(ow.onnxruntime_library()).read_bytes())
    np.save(tmp_path / "x.npy", x.numpy())
    files = [str(tmp_path / name) for name in ("library.so", "net.onnx", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-P", "-c", _ALONE, *files], check=True, cwd=tmp_path, timeout=120)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), x @ weight.T, atol=1e-4, rtol=1e-4)


def test_a_library_that_is_missing_or_damaged_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = Path(ow.onnxruntime_library()).read_bytes()
    monkeypatch.setattr(onnxruntime_operators, "_FILE", tmp_path / "libopenwork_ort.so")
    with pytest.raises(RuntimeError, match="was not built"):
        ow.onnxruntime_library()
    (tmp_path / "libopenwork_ort.so").write_bytes(whole[:-100])
    with pytest.raises(RuntimeError, match="install openwork again"):
        ow.onnxruntime_library()
