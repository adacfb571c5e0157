"""torch's own ways to run a network: as it is, in channels_last, and compiled with frozen weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from openwork.engines.case import Case, Prepared, Refused
from openwork.utils.example import mapped, run
from openwork.utils.timing import compile_frozen


def eager(case: Case) -> Prepared:
    """The module itself. In int8 its linear layers in torch's dynamic quantization, inputs quantized as they come."""
    model, example = case.model()
    if case.precision == "int8":
        model = _quantized(model)
    return _prepared(partial(run, model, example))


def channels_last(case: Case) -> Prepared:
    """The module with the weights and inputs of its convolutions in channels_last."""
    model, example = case.model()
    if not _convolves(model):
        raise Refused("for networks with Conv2d, and this has none")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = mapped(example, lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)
    return _prepared(partial(run, model, example))


def compiled(case: Case) -> Prepared:
    """By torch.compile at its best: weights are constants, which oneDNN lays out ahead of time."""
    model, example = case.model()
    return _prepared(partial(run, compile_frozen(model, example), example))


def _prepared(call: Callable[[], Any]) -> Prepared:
    return Prepared({"": call}, f"torch {torch.__version__}")


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _quantized(model: nn.Module) -> nn.Module:
    if _convolves(model) or not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise Refused("torch's dynamic int8 is for networks whose products are all linear layers")
    if torch.backends.quantized.engine == "none":
        raise Refused("this torch was built without int8 products")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to be moved to another package, some day
        made: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return made
