"""A packed weight whose offsets are damaged, wherever they are kept: an error, and never memory of others."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.inference.layers import pack_layer
from openwork.layouts.layout import kind_named

needs_library = pytest.mark.skipif(not ow.kernels.status().available, reason="references index with checks of torch")
X = torch.randn(5, 64)
IMAGES = torch.randn(2, 8, 4, 4)
DAMAGED = "offset 0 is 65532; needed a multiple of"


def packed(convolves: bool = False) -> Any:
    layer = nn.Conv2d(8, 6, 3) if convolves else nn.Linear(64, 16)
    ow.project(layer, "2:4")
    return pack_layer(layer.eval().requires_grad_(False), ow.Pattern(2, 4), kind_named("gemm"), torch.float32)


def refused(call: Callable[..., object], *inputs: object) -> None:
    with pytest.raises((ValueError, RuntimeError), match=DAMAGED):
        call(*inputs)


@needs_library
@pytest.mark.parametrize("convolves", [False, True])
def test_offsets_that_change_in_a_layer_are_looked_at_again(convolves: bool) -> None:
    layer, x = packed(convolves), IMAGES if convolves else X
    y, right = layer(x), layer.packed.offsets.clone()
    layer.packed.offsets.fill_(-4)
    for _ in range(2):
        refused(layer, x)
    layer.packed.offsets.copy_(right)
    assert torch.equal(layer(x), y)
    layer.packed.offsets = torch.full_like(right, -4)
    refused(layer, x)


@needs_library
def test_a_layout_that_is_pickled_alone() -> None:
    layer = packed()
    layer(X)
    layer.packed.offsets.fill_(-4)
    refused(pickle.loads(pickle.dumps(layer.packed)).linear, X, None, False)


def test_integers_of_a_pickle_are_those_that_were_checked() -> None:
    layer = packed()
    y = layer(X)
    layer.packed.integers[-1] = 128
    layer.packed.shape = (16, 128)
    again = pickle.loads(pickle.dumps(layer))
    assert again.packed.integers == list(layer.packed.numbers)
    assert again.packed.shape == (16, 64)
    assert torch.equal(again(X), y)


@needs_library
def test_an_exported_program_with_damaged_constants() -> None:
    layer, file = packed(), io.BytesIO()
    program = torch.export.export(layer, (X,))
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    (name,) = [name for name in program.constants if name.endswith("offsets")]
    program.constants[name].fill_(-4)
    refused(program.module(), X)


@needs_library
def test_offsets_that_change_in_a_compiled_layer() -> None:
    layer = packed()
    fast = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), layer(X))
        layer.packed.offsets.fill_(-4)
        refused(fast, X)
