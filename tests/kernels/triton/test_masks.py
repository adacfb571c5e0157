"""Against the definitions, bit by bit: ties, NaN, infinities, short groups, every order in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from openwork.axis import Axis
from openwork.kernels.triton import bits, masks
from openwork.masks import keep_largest
from openwork.metrics import pack, packed_sad
from openwork.pattern import Pattern

_spec = importlib.util.spec_from_file_location("native_masks", Path(__file__).parent.parent / "test_masks.py")
native: Any = importlib.util.module_from_spec(_spec)  # its cases: pytest imports tests by file, so this does too
sys.modules["native_masks"] = native
_spec.loader.exec_module(native)

few = settings(max_examples=8, deadline=None, derandomize=True)
# The interpreter takes a millisecond for an operation, and these groups take M rounds of ten.
small = native.cases().filter(lambda case: case[1].m <= 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def refuse(*_: object) -> None:
    raise AssertionError("the reference ran")


@few
@given(case=small)
def test_keep_and_prune_are_the_definition_bit_by_bit(case: Any) -> None:
    weight, pattern, axis = case
    keep = keep_largest(weight.abs(), pattern, axis)
    assert torch.equal(masks.keep_largest(weight.abs(), *native.where(pattern, axis)), keep)
    pruned = masks.prune(weight, *native.where(pattern, axis))
    assert torch.equal(native.bits(pruned), native.bits(torch.where(keep, weight, 0.0)))


@few
@given(case=small)
def test_decay_is_the_definition_bit_by_bit(case: Any) -> None:
    weight, pattern, axis = case
    gradient = torch.empty_like(weight).copy_(native.numbers(tuple(weight.shape), weight.dtype, 1, "bits"))
    expected = native.defined_decay(gradient, weight, 2e-4, keep_largest(weight.abs(), pattern, axis))
    masks.add_decayed(gradient, weight, 2e-4, *native.where(pattern, axis))
    assert native.same_or_nan(gradient, expected)


@pytest.mark.parametrize(
    ("shape", "pattern", "dtype"),
    [
        *(((5, 768), (2, 4), dtype) for dtype in DTYPES),
        ((3, 64, 9), (1, 16), torch.bfloat16),
        ((9, 67), (5, 32), torch.float32),
        ((1, 130), (9, 64), torch.float16),
    ],
)
def test_kernels_and_not_the_reference(dtype: torch.dtype, shape: Any, pattern: Any, monkeypatch: Any) -> None:
    for name in ("_keep_largest", "_prune", "_add_decayed"):
        monkeypatch.setattr(masks.reference, name, refuse)
    weight, gradient = native.numbers(shape, dtype, 0, "ties"), native.numbers(shape, dtype, 1, "real")
    keep = keep_largest(weight.abs(), Pattern(*pattern), Axis(1))
    expected = native.defined_decay(gradient, weight, 0.37, keep)
    at = (*pattern, 1, 1, False)
    assert torch.equal(masks.keep_largest(weight.abs(), *at), keep)
    assert torch.equal(native.bits(masks.prune(weight, *at)), native.bits(torch.where(keep, weight, 0.0)))
    masks.add_decayed(gradient, weight, 0.37, *at)
    assert native.same_or_nan(gradient, expected)


def listed() -> tuple[list[Tensor], list[Axis]]:
    """Weights of several geometries, dtypes and memory formats; one that no kernel takes, one without numbers."""
    shapes = [
        ((6, 32), Axis(1)),
        ((3, 20, 3, 3), Axis(1)),
        ((8, 6, 2), Axis(0, blocks=2)),
        ((7, 30), Axis(1)),
        ((100, 16), Axis(1)),
    ]
    made = [native.numbers(shape, DTYPES[i % 3], i, "ties") for i, (shape, _) in enumerate(shapes)]
    made.append(native.numbers((4, 16, 3, 3), torch.float32, 9, "real").to(memory_format=torch.channels_last))
    made.append(torch.randn(4, 24)[:, ::2])
    made.append(torch.zeros(0, 4))
    return made, [axis for _, axis in shapes] + [Axis(1)] * 3


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 3)])
def test_lists_are_their_members(pattern: Pattern) -> None:
    weights, axes = listed()
    each = ([a.dim for a in axes], [a.blocks for a in axes], [a.flat for a in axes])
    keep = [keep_largest(w.abs(), pattern, axis) for w, axis in zip(weights, axes, strict=True)]
    found = masks.keep_largest_list([w.abs() for w in weights], pattern.n, pattern.m, *each)
    assert all(torch.equal(a, b) for a, b in zip(found, keep, strict=True))
    pruned = masks.prune_list(weights, pattern.n, pattern.m, *each)
    alike = [torch.where(k, w, 0.0) for w, k in zip(weights, keep, strict=True)]
    assert all(torch.equal(native.bits(a), native.bits(b)) for a, b in zip(pruned, alike, strict=True))
    gradients = [torch.empty_like(w).copy_(native.numbers(tuple(w.shape), w.dtype, 1, "real")) for w in weights]
    expected = [native.defined_decay(g, w, 0.5, k) for g, w, k in zip(gradients, weights, keep, strict=True)]
    masks.add_decayed_list(gradients, weights, 0.5, pattern.n, pattern.m, *each)
    assert all(native.same_or_nan(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_list_is_one_launch_for_each_dtype(monkeypatch: Any) -> None:
    weights, axes = listed()
    launches = []
    real = masks._many

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return real[grid]

    monkeypatch.setattr(masks, "_many", Counting())
    for name in ("_one", "reference"):
        monkeypatch.delattr(masks, name)
    masks.keep_largest_list(weights[:6], 2, 4, [a.dim for a in axes[:6]], [a.blocks for a in axes[:6]], [False] * 6)
    assert len(launches) == 3


def test_bits_and_their_differences_are_the_definition() -> None:
    kept = [torch.rand(shape) < 0.5 for shape in ((3, 5), (1,), (70, 130), (2, 8), (0,))]
    found = bits.pack_list(kept)
    assert all(torch.equal(a, pack(b)) for a, b in zip(found, kept, strict=True))
    others = [pack(torch.rand(mask.shape) < 0.5) for mask in kept]
    expected = [packed_sad(a, b) for a, b in zip(found, others, strict=True)]
    assert bits.packed_sad_list(found, others).tolist() == expected
    assert sum(expected) > 4000


@pytest.mark.parametrize("at", [(2, 65, 1, 1, False), (2, 4, 2, 1, False), (2, 4, 1, 3, False)])
def test_numbers_that_make_no_groups_are_refused(at: Any) -> None:
    with pytest.raises(ValueError, match=r"1 <= N <= M <= 64|does not fit"):
        masks.prune(torch.ones(4, 8), *at)


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient \(4, 4\).*weight \(8, 4\)"):
        masks.add_decayed(torch.zeros(4, 4), torch.ones(8, 4), 0.5, 1, 4, 1, 1, False)
