"""A dense network on the engines that others would take on a CPU."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def spread(times: Sequence[float]) -> tuple[float, dict[str, float]]:
    """The median, and the 20th and 80th percentiles."""
    ordered = sorted(times)
    fifths = {f"p{20 * k}": ordered[len(ordered) * k // 5] for k in (1, 4)}
    return statistics.median(ordered), fifths


def dense_engines(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Calls of ONNX Runtime and OpenVINO, which return the first output as an array. Shapes are fixed to those of the
    example, which suits them best, on as many threads as torch has, in float32."""
    import onnxruntime
    import openvino

    inputs, threads = {name: tensor.numpy() for name, tensor in example.items()}, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path, how = Path(folder) / "model.onnx", {"dynamo": True, "external_data": True, "verbose": False}
        torch.onnx.export(model, kwargs=dict(example), f=path, input_names=[*example], **how)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return {
        "dense: ONNX Runtime": lambda: session.run(None, inputs)[0],
        "dense: OpenVINO": lambda: request.infer(inputs)[0].copy(),
    }
