"""The dense network in other engines that are installed, beside what `deploy` returns."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openwork.engines.case import Case, Refused, first_line, in_dtype, write_program
from openwork.engines.engine import ENGINES
from openwork.engines.worker import Worker, timed
from openwork.inference.packed_weight import bytes_held
from openwork.inference.plan import OtherEngines
from openwork.utils.timing import race

MOST_BYTES = 2**30
"""Of a larger network the files and copies that engines need are too much to make unasked."""

TURN = 0.15
"""Seconds of a turn, and one run more that is not counted."""

OFF = "OPENWORK_NO_ENGINES"
"""Set to 1 in the environment it turns all of this off."""


def other_engines(
    dense: nn.Module,
    example: Any,
    returned: Callable[[], object],
    weight_dtype: torch.dtype,
    seconds: float,
    calibration: Sequence[Any] = (),
) -> OtherEngines | None:
    """Time a dense network on a CPU in OpenVINO and ONNX Runtime, as far as they are installed, in turns with
    `returned`, in the precision of `weight_dtype` or else float32 (int8: static scales of `calibration`, or of the
    example alone). They run in a process of its own that is given the network as a program, within so many seconds.

    None where it is not to be done. What cannot be compared is told in `left_out`."""
    on_cpu = all(each.device.type == "cpu" for each in (*dense.parameters(), *dense.buffers()))
    if seconds <= 0 or os.environ.get(OFF, "0") != "0" or not on_cpu:
        return None
    engines = [engine for engine in ENGINES if engine.reads_onnx]
    missing = {engine.name: engine.missing() for engine in engines if engine.missing()}
    names = ", ".join(engine.name for engine in engines if engine.name not in missing)
    if not names:
        return OtherEngines(left_out=missing)
    if bytes_held(dense) > MOST_BYTES:
        return OtherEngines(left_out={**missing, names: f"more than {MOST_BYTES >> 20} MiB of weights"})
    precision, end = str(weight_dtype).removeprefix("torch."), time.monotonic() + seconds
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = dense if all(each.dtype == torch.float32 for each in dense.parameters()) else _in_float32(dense)
            write_program(Path(folder), plain, in_dtype(example, torch.float32), calibration)
            case = Case(Path(folder), precision, torch.get_num_threads())
            with Worker("openwork.engines.onnx_engines:installed", case, end - time.monotonic()) as worker:
                left = end - time.monotonic()
                turns = {name: partial(worker.turn, name, TURN, most=left) for name in worker.names}
                turns[""] = partial(timed, returned, TURN)
                with torch.inference_mode():
                    found = race({name: partial(_median, turn) for name, turn in turns.items()}, min(10.0, left))
                ours = found.pop("")
                return OtherEngines(found, ours, {**missing, **worker.about["left out"]})
    except (Refused, OSError, RuntimeError) as error:  # a full disk is one or the other
        reason = str(error) if isinstance(error, Refused) else first_line(error)
        return OtherEngines(left_out={**missing, names: reason})


def _median(turn: Callable[[], Sequence[float]]) -> float:
    return statistics.median(turn())


def _in_float32(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()
