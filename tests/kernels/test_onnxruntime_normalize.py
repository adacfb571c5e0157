"""The operator of ONNX Runtime that normalizes sums: against torch, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from openwork.kernels.cpu import onnxruntime_operators

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from one_operator import session  # noqa: E402

pytestmark = pytest.mark.skipif(not onnxruntime_operators._FILE.exists(), reason="needs the library of operators")


def norm(size: int, outputs: int = 1, **changed: Any) -> Any:
    """A file of the node alone; `changed` replaces the constants scale and bias, or epsilon."""
    constants = {"scale": np.linspace(-1, 2, size, dtype=np.float32), "bias": np.ones(size, np.float32)}
    constants |= {name: changed.pop(name) for name in ("scale", "bias") if name in changed}
    names = [name for name, array in constants.items() if array is not None]
    results = ["y", "sum"][:outputs]
    attributes = {"epsilon": 1e-5} | changed
    node = onnx.helper.make_node("AddLayerNormalization", ["x", "a", *names], results, domain="openwork", **attributes)
    made = [onnx.numpy_helper.from_array(constants[name], name) for name in names]
    data = [onnx.helper.make_tensor_value_info(name, 1, [None, None, None]) for name in ("x", "a", *results)]
    graph = onnx.helper.make_graph([node], "one", data[:2], data[2:], made)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("openwork", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("size", [1, 5, 32, 100, 768])
def test_it_is_the_normalized_sum(size):
    x, added = 3 + 10 * torch.randn(2, 70, size), torch.randn(2, 70, size)
    scale, bias = torch.linspace(-1, 2, size), torch.ones(size)
    expected = F.layer_norm(x + added, (size,), scale, bias)
    for outputs, threads in ((1, 1), (2, 3)):
        feed = {"x": x.numpy(), "a": added.numpy()}
        found = [torch.from_numpy(each) for each in session(norm(size, outputs), threads).run(None, feed)]
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
        assert outputs == 1 or torch.equal(found[1], x + added)
    without = session(norm(size, bias=None)).run(None, feed)[0]
    torch.testing.assert_close(torch.from_numpy(without), expected - bias, atol=1e-5, rtol=1e-5)


def test_what_is_far_from_zero_keeps_its_digits():
    x = 1000 + torch.randn(1, 4, 768)
    y = session(norm(768, scale=np.ones(768, np.float32), bias=None)).run(None, {"x": x.numpy(), "a": 0 * x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), F.layer_norm(x.double(), (768,)).float(), atol=1e-3, rtol=1e-3)


def test_files_and_inputs_that_do_not_fit_are_refused():
    for changed, message in (
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"scale": np.ones((1, 8), np.float32)}, r"scale \(1, 8\)"),
        ({"scale": np.ones(0, np.float32)}, r"scale \(0\)"),
        ({"bias": np.ones(7, np.float32)}, "equally long"),
        ({"bias": np.ones(8)}, "[Tt]ype"),
    ):
        with pytest.raises(Exception, match=message):
            session(norm(8, **changed))
    made = session(norm(8))
    for x, added in (((1, 2, 8), (1, 1, 8)), ((1, 2, 7), (1, 2, 7)), ((1, 2, 8), (2, 1, 8))):
        with pytest.raises(Exception, match="needed equal ones"):
            made.run(None, {"x": np.zeros(x, np.float32), "a": np.zeros(added, np.float32)})
    assert made.run(None, {"x": np.zeros((0, 2, 8), np.float32), "a": np.zeros((0, 2, 8), np.float32)})[0].size == 0
