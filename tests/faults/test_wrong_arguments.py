"""What is handed over in the wrong place is named for what it is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.export import to_onnx

X = torch.zeros(2, 16)
FILE = "net.safetensors"
SGD = torch.optim.SGD([nn.Parameter(X)], 0.1)
NO_MODEL: dict[str, tuple[Callable[[], object], str]] = {
    "attach, the other way round": (lambda: ow.attach(nn.Linear(16, 8), SGD), "SGD"),  # type: ignore[arg-type]
    "attach to nothing": (lambda: ow.attach(SGD, None), "NoneType"),  # type: ignore[arg-type]
    "sparsify an optimizer": (lambda: ow.sparsify(SGD, "2:4"), "SGD"),  # type: ignore[arg-type]
    "sparsify a class": (lambda: ow.sparsify(nn.Linear, "2:4"), "the class Linear"),  # type: ignore[arg-type]
    "project a state dict": (lambda: ow.project(nn.Linear(4, 4).state_dict(), "2:4"), "OrderedDict"),  # type: ignore[arg-type]
    "verify, the other way round": (lambda: ow.verify(X, nn.Linear(16, 8)), "Tensor"),  # type: ignore[arg-type]
    "finalize a path": (lambda: ow.finalize(FILE), "str"),  # type: ignore[type-var]
    "masks": (lambda: ow.masks(SGD), "SGD"),  # type: ignore[arg-type]
    "save, the other way round": (lambda: ow.save(FILE, nn.Linear(16, 8)), "str"),  # type: ignore[arg-type]
    "deploy, the other way round": (lambda: ow.deploy(X, nn.Linear(16, 8)), "Tensor"),  # type: ignore[arg-type]
    "plan": (lambda: ow.plan(X, nn.Linear(16, 8)), "Tensor"),  # type: ignore[arg-type]
    "load_deployed": (lambda: ow.load_deployed(nn.Linear(16, 8), FILE, X), "str"),  # type: ignore[arg-type]
    "change_pattern": (lambda: ow.change_pattern("1:4", nn.Linear(16, 8)), "str"),  # type: ignore[arg-type]
    "to_onnx": (lambda: to_onnx(X, nn.Linear(16, 8), "net.onnx"), "Tensor"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", NO_MODEL)
def test_what_is_no_model(call: str) -> None:
    function, found = NO_MODEL[call]
    with pytest.raises(TypeError, match=f"^found {found} where the model is needed, a torch.nn.Module$"):
        function()


@pytest.mark.parametrize("choose", [ow.topn, ow.topn_transposable])
@pytest.mark.parametrize("wrong", ["2:4", (2, 4)], ids=str)
def test_what_is_no_pattern(choose: Callable[..., object], wrong: object) -> None:
    with pytest.raises(
        TypeError, match=re.escape(f"found {wrong!r} of type {type(wrong).__name__}; needed an ow.Pattern")
    ):
        choose(torch.ones(4, 4), wrong)
