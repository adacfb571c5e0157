"""The library of operators and those who load it: other versions of ONNX Runtime, several threads, many sessions."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import openwork as ow
from openwork.kernels.cpu import native, onnxruntime_operators

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from one_operator import model, ran, session, sparse

pytestmark = pytest.mark.skipif(
    native.library() is None or not onnxruntime_operators._FILE.exists(), reason="needs the native libraries"
)


def test_an_older_onnx_runtime_is_told_what_is_needed():
    said = []

    version = ctypes.create_string_buffer(b"1.16.3")

    @ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, text):
        said.append((code, text.decode()))
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p).value)

    @ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint32)
    def get_api(asked):
        return ctypes.addressof(table) if asked < 17 else 0

    @ctypes.CFUNCTYPE(ctypes.c_size_t)
    def get_version():
        return ctypes.addressof(version)

    base = (ctypes.c_void_p * 2)(*(ctypes.cast(each, ctypes.c_void_p).value for each in (get_api, get_version)))
    register = ctypes.CDLL(ow.onnxruntime_library()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert said == [(1, "openwork: its operators need ONNX Runtime 1.17 or newer, this is 1.16.3")]


def test_one_session_that_several_threads_run():
    weight = sparse((300, 256), "1:4")
    inputs = [torch.randn(rows, 256) for rows in (1, 700, 20, 900, 500, 16)]
    file = model("SparseLinear", weight, "1:4", None, ["b", 256])
    shared, right = session(file, 2), []
    expected = [ran(file, x).numpy() for x in inputs]

    def work(own: int) -> None:
        x, y = inputs[own].numpy(), expected[own]
        right.append(all(np.array_equal(shared.run(None, {"x": x})[0], y) for _ in range(50)))

    threads = [threading.Thread(target=work, args=(own,)) for own in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * len(inputs)


_MANY = """
import sys, numpy, onnxruntime
def kib(): return int(open("/proc/self/statm").read().split()[1]) * 4  # not the peak, which a process inherits
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
options.intra_op_num_threads = 1
x = numpy.zeros((1, 512), numpy.float32)
def once():
    session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": x})
for _ in range(30): once()
before = kib()
for _ in range(150): once()
grown = kib() - before
assert grown < 8000, f"memory grew by {grown} KiB"
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux tells of a process")
def test_sessions_that_are_closed_leave_nothing(tmp_path: Path):
    # 150 packed weights would be 120 MB.
    (tmp_path / "net.onnx").write_bytes(model("SparseLinear", sparse((512, 512), "2:4"), "2:4", None, ["b", 512]))
    words = [ow.onnxruntime_library(), str(tmp_path / "net.onnx")]
    subprocess.run([sys.executable, "-P", "-c", _MANY, *words], check=True, timeout=120)
