"""A dense network on the engines that others would take on a CPU, in this process."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.engines.case import Case, write_program
from openwork.engines.onnx_engines import installed


def spread(times: Sequence[float]) -> tuple[float, dict[str, float]]:
    """The median, and the 20th and 80th percentiles."""
    ordered = sorted(times)
    fifths = {f"p{20 * k}": ordered[len(ordered) * k // 5] for k in (1, 4)}
    return statistics.median(ordered), fifths


def dense_engines(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Calls of OpenVINO and ONNX Runtime, as far as they are installed, which return the first output as an array. On
    as many threads as torch has, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write_program(Path(folder), model, dict(example))
        prepared = installed(Case(Path(folder), threads=torch.get_num_threads()))
    for name, reason in prepared.about["left out"].items():
        print(f"without {name}: {reason}")
    return {f"dense: {name}": lambda call=call: call()[0] for name, call in prepared.calls.items()}
