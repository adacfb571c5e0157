"""The encoders of sentences.py on this machine: as deployed by Openwork, and the dense one on the engines that others
would take, in turns, on the same threads."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.utils.timing import compile_frozen, take_turns

sys.path.insert(0, str(Path(__file__).parent))
from engines import dense_engines, spread

Example = Mapping[str, Tensor]


def compare(models: Mapping[str, nn.Module], example: Example, compiled: bool, least: int = 15) -> dict[str, Any]:
    """For each variant: the median of its times, and their 20th and 80th percentiles, in milliseconds; how far its
    outputs are from those of the same network in torch, at most, embeddings being of length 1; and, of what is
    deployed, which way won."""
    dense = models["dense"]
    with torch.inference_mode():
        wanted = {name: model(**example).numpy() for name, model in models.items()}
    calls: dict[str, Callable[[], Any]] = {"dense: torch": functools.partial(_run, dense, example)}
    about: dict[str, dict[str, Any]] = {}
    if compiled:
        calls["dense: torch.compile, frozen"] = functools.partial(_run, compile_frozen(dense, dict(example)), example)
    calls |= dense_engines(dense, example)
    for name, model in models.items():
        if name == "dense":
            continue
        with warnings.catch_warnings(record=True):  # that dense won is in the plan
            deployed: Any = ow.deploy(copy.deepcopy(model), dict(example), engine_seconds=0)
        said = f"{name}: ow.deploy"
        calls[said] = functools.partial(_run, deployed, example)
        kinds = [layer.kind for layer in deployed.deployment.layers]
        about[said] = {"returned": deployed.deployment.returned, "layers": {str(k): kinds.count(k) for k in {*kinds}}}
        if compiled:
            made = compile_frozen(deployed, dict(example))
            calls[f"{said}, compiled"] = functools.partial(_run, made, example)
    with torch.inference_mode():
        times = take_turns(calls, 4.0 * len(calls), least=least, most=300)
        found = {}
        for said, call in calls.items():
            own = wanted[said.partition(":")[0]]
            median, fifths = spread([1e3 * each for each in times[said]])
            found[said] = {"ms": median, **fifths}
            found[said] |= {"difference": float(np.abs(np.asarray(call()) - own).max()), **about.get(said, {})}
    return found


def _run(model: nn.Module, example: Example) -> Any:
    return model(**example).numpy()
