"""Against the definitions, bit by bit: ties, NaN, infinities, short groups, every order in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from openwork.kernels.cuda import stream
from openwork.kernels.cuda.triton import bits, launch, masks
from openwork.nm.groups import Axis
from openwork.nm.mask_stats import pack, packed_sad
from openwork.nm.masks import magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.library import axis_numbers

_spec = importlib.util.spec_from_file_location("native_masks", Path(__file__).parent.parent / "test_masks.py")
native: Any = importlib.util.module_from_spec(_spec)  # its cases: pytest imports tests by file, so this does too
sys.modules["native_masks"] = native
_spec.loader.exec_module(native)

few = settings(max_examples=8, deadline=None, derandomize=True)
# The interpreter takes a millisecond for an operation, and these groups take M rounds of ten.
small = native.cases().filter(lambda case: case[1].m <= 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


AT = [1, 1, 0]  # Axis(1)
REFERENCES = ("magnitude_mask", "apply_mask", "add_decay")


def refuse(*_: object) -> None:
    raise AssertionError("the reference ran")


def without_references(monkeypatch: Any) -> None:
    for name in REFERENCES:
        monkeypatch.delattr(masks, name)


@few
@given(case=small)
def test_keep_and_prune_are_the_definition_bit_by_bit(case: Any) -> None:
    weight, pattern, axis = case
    keep = magnitude_mask(weight.abs(), pattern, axis)
    assert torch.equal(masks.foreach_mask([weight.abs()], *native.where(pattern, axis))[0], keep)
    pruned = masks.foreach_prune([weight], *native.where(pattern, axis))[0]
    assert torch.equal(native.bits(pruned), native.bits(torch.where(keep, weight, 0.0)))


@few
@given(case=small)
def test_decay_is_the_definition_bit_by_bit(case: Any) -> None:
    weight, pattern, axis = case
    gradient = torch.empty_like(weight).copy_(native.numbers(tuple(weight.shape), weight.dtype, 1, "bits"))
    expected = native.defined_decay(gradient, weight, 2e-4, magnitude_mask(weight.abs(), pattern, axis))
    masks.foreach_decay([gradient], [weight], 2e-4, *native.where(pattern, axis))
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
    for name in REFERENCES:
        monkeypatch.setattr(masks, name, refuse)
    weight, gradient = native.numbers(shape, dtype, 0, "ties"), native.numbers(shape, dtype, 1, "real")
    keep = magnitude_mask(weight.abs(), Pattern(*pattern), Axis(1))
    expected = native.defined_decay(gradient, weight, 0.37, keep)
    at = (*pattern, AT)
    assert torch.equal(masks.foreach_mask([weight.abs()], *at)[0], keep)
    assert torch.equal(native.bits(masks.foreach_prune([weight], *at)[0]), native.bits(torch.where(keep, weight, 0.0)))
    masks.foreach_decay([gradient], [weight], 0.37, *at)
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
    places = axis_numbers(axes)
    keep = [magnitude_mask(w.abs(), pattern, axis) for w, axis in zip(weights, axes, strict=True)]
    found = masks.foreach_mask([w.abs() for w in weights], pattern.n, pattern.m, places)
    assert all(torch.equal(a, b) for a, b in zip(found, keep, strict=True))
    pruned = masks.foreach_prune(weights, pattern.n, pattern.m, places)
    alike = [torch.where(k, w, 0.0) for w, k in zip(weights, keep, strict=True)]
    assert all(torch.equal(native.bits(a), native.bits(b)) for a, b in zip(pruned, alike, strict=True))
    gradients = [torch.empty_like(w).copy_(native.numbers(tuple(w.shape), w.dtype, 1, "real")) for w in weights]
    expected = [native.defined_decay(g, w, 0.5, k) for g, w, k in zip(gradients, weights, keep, strict=True)]
    masks.foreach_decay(gradients, weights, 0.5, pattern.n, pattern.m, places)
    assert all(native.same_or_nan(a, b) for a, b in zip(gradients, expected, strict=True))


class Launches:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: Any) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


def counted(monkeypatch: Any, name: str) -> list[Any]:
    launches = Launches(getattr(masks, name))
    monkeypatch.setattr(masks, name, launches)
    return launches.grids


def test_a_list_is_one_launch_for_each_dtype_and_way_to_lie(monkeypatch: Any) -> None:
    weights, axes = listed()
    places = axis_numbers(axes[:6])
    pairs = zip(weights[:6], axes[:6], strict=True)
    ways = {(w.dtype, masks.group_layout(w, Pattern(2, 4), axis).how) for w, axis in pairs}
    lists = counted(monkeypatch, "_many")
    masks.foreach_mask(weights[:6], 2, 4, places)
    assert len(lists) == len(ways) == 5
    one_by_one = counted(monkeypatch, "_one")
    masks.foreach_mask(weights[:6], 2, 4, places)
    assert (len(lists), len(one_by_one)) == (10, 0)


def test_a_list_loads_what_a_cuda_graph_would_launch(monkeypatch: Any) -> None:
    weights, loaded = [torch.randn(4, 8), torch.randn(4, 8, 3), torch.randn(4, 7)], []
    real = masks._launch_one
    monkeypatch.setattr(masks, "_launch_one", lambda *of: loaded.append((of[0].dtype, *of[2:])) or real(*of))
    masks._load_one.cache_clear()
    for _ in range(2):
        masks.foreach_prune(weights, 1, 4, 3 * AT)
    assert {layout.how for _, layout, _ in loaded} == {masks.WHOLE, masks.STRIDED, masks.SHORT}
    assert [(kind, layout[:2], layout.lanes, task) for kind, layout, task in loaded] == 3 * [
        (torch.float32, (1, 4), 0, masks.PRUNE)
    ]


def test_while_a_cuda_graph_is_captured_there_are_no_tables(monkeypatch: Any) -> None:
    weights, places = [torch.randn(4, 8), torch.randn(4, 8, 3)], 2 * AT
    for file in (masks, bits):
        monkeypatch.setattr(file, "capturing", lambda *tensors: True)
        monkeypatch.delattr(file, "table")
    without_references(monkeypatch)
    launches = counted(monkeypatch, "_one")
    keep = [magnitude_mask(w.abs(), Pattern(2, 4), Axis(1)) for w in weights]
    assert all(map(torch.equal, masks.foreach_mask([w.abs() for w in weights], 2, 4, places), keep))
    assert all(map(torch.equal, masks.foreach_prune(weights, 2, 4, places), map(torch.mul, weights, keep)))
    gradients = [torch.zeros_like(w) for w in weights]
    masks.foreach_decay(gradients, weights, 1.0, 2, 4, places)
    assert all(torch.equal(g, w * ~k) for g, w, k in zip(gradients, weights, keep, strict=True))
    assert len(launches) == 6
    packed = bits.foreach_pack(keep)
    assert all(map(torch.equal, packed, map(pack, keep)))
    assert bits.foreach_packed_sad(packed, [~each for each in packed]).tolist() == [32, 96]


def test_when_a_cuda_graph_is_captured(monkeypatch: Any) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    for captures in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)  # noqa: B023
        assert stream.capturing(on_gpu) is captures
        assert not stream.capturing(torch.ones(1))
        assert not stream.capturing()


def test_a_table_is_copied_from_pinned_memory_without_waiting(monkeypatch: Any) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda made: pinned.append(made) or made)
    monkeypatch.setattr(Tensor, "to", lambda made, device, non_blocking=False: (made, device, non_blocking))
    gpu: Any = SimpleNamespace(type="cuda")
    for _ in range(2):
        made: Any = launch.table([(7,), (9,)], [0, 3], gpu)
        assert made[1:] == (gpu, True)
    assert len(pinned) == 2
    launch.table([(7,), (9,)], [0, 3], torch.device("cpu"))
    assert len(pinned) == 2


def test_what_a_list_leaves_out_is_one_launch_each(monkeypatch: Any) -> None:
    """Here for an address that is not a multiple of 16."""
    without_references(monkeypatch)
    launches = counted(monkeypatch, "_one")
    weight = torch.randn(33)[1:].view(4, 8)
    keep = magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1))
    (found,) = masks.foreach_mask([weight], 2, 4, AT)  # the sign does not count
    assert torch.equal(found, keep)
    assert torch.equal(masks.foreach_prune([weight], 2, 4, AT)[0], weight * keep)
    assert len(launches) == 2


def test_strides_of_dims_of_size_one_do_not_matter(monkeypatch: Any) -> None:
    """A gradient of a 1x1 convolution often comes in the strides of the other memory format."""
    without_references(monkeypatch)
    weight = torch.randn(8, 8, 1, 1)
    gradient = torch.empty_strided((8, 8, 1, 1), (8, 1, 8, 8)).zero_()
    assert gradient.stride() != weight.stride()
    expected = weight * ~magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1))
    masks.foreach_decay([gradient], [weight], 1.0, 2, 4, AT)
    assert torch.equal(gradient, expected)
    launches = counted(monkeypatch, "_many")
    masks.foreach_decay([gradient, torch.zeros(4, 4)], [weight, torch.zeros(4, 4)], 1.0, 2, 4, 2 * AT)
    assert torch.equal(gradient, 2 * expected)
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("shape", "m"),
    [
        ((1, 4, 2**29, 2), 4),  # three steps of 2**30
        ((1, 2**31 - 3), 4),  # the last group ends after 2**31
        ((2**31 - 2**9, 1), 1),  # counting lanes in programs passes 2**31
        ((2**20, 2**11, 4), 1),
    ],
)
def test_weights_that_32_bits_cannot_count_are_left_to_the_reference(shape: tuple[int, ...], m: int) -> None:
    def layout(shape: tuple[int, ...]) -> Any:
        return masks.layout_at(shape, torch.empty(shape, device="meta").stride(), Pattern(1, m), Axis(1))

    assert layout(shape) is None
    assert layout(tuple(max(1, size // 4) for size in shape)) is not None


def test_how_a_weight_lies_is_found_once(monkeypatch: Any) -> None:
    weight = torch.randn(12, 16)
    first = masks.foreach_prune([weight], 2, 4, AT)[0]
    monkeypatch.delattr(masks, "groups_in_memory")
    assert torch.equal(masks.foreach_prune([weight], 2, 4, AT)[0], first)


def patterns() -> list[tuple[int, int]]:
    """Those where rounds, unrolled or not, keep and drop; one where the group fills its lanes, one where not."""
    rounds = [(n, m) for m in (3, 4, 16, 17, 33, 64) for n in (1, m // 2, m // 2 + 1, m - 1, m)]
    return sorted({*rounds, (1, 1), (2, 2), (9, 24)})


@pytest.mark.parametrize("pattern", patterns())
def test_every_number_of_rounds_with_ties_nan_and_infinity(pattern: tuple[int, int], monkeypatch: Any) -> None:
    without_references(monkeypatch)
    n, m = pattern
    for index, shape in enumerate([(16, 2 * m), (2, m + max(1, m // 3)), (3, m + max(1, m - 1), 3)]):
        weight = native.numbers(shape, DTYPES[(index + m) % 3], n, "ties")
        keep = magnitude_mask(weight.abs(), Pattern(n, m), Axis(1))
        assert torch.equal(masks.foreach_mask([weight.abs()], n, m, AT)[0], keep)
        pruned = masks.foreach_prune([weight], n, m, AT)[0]
        assert torch.equal(native.bits(pruned), native.bits(torch.where(keep, weight, 0.0)))


@pytest.mark.parametrize(("pattern", "rounds"), [((2, 4), 2), ((3, 4), 1), ((1, 16), 1), ((60, 64), 4), ((5, 5), 0)])
def test_what_is_less_work_is_done(pattern: tuple[int, int], rounds: int, monkeypatch: Any) -> None:
    done, real = [], masks._without_largest
    monkeypatch.setattr(masks, "_without_largest", lambda *of: done.append(0) or real(*of))
    masks.foreach_prune([torch.randn(1, pattern[1])], *pattern, AT)
    assert len(done) == rounds


def test_bits_and_their_differences_are_the_definition() -> None:
    kept = [torch.rand(shape) < 0.5 for shape in ((0,), (3, 5), (1,), (0,), (0, 3), (70, 130), (2, 8), (0,))]
    found = bits.foreach_pack(kept)
    assert all(torch.equal(a, pack(b)) for a, b in zip(found, kept, strict=True))
    others = [pack(torch.rand(mask.shape) < 0.5) for mask in kept]
    expected = [packed_sad(a, b) for a, b in zip(found, others, strict=True)]
    assert bits.foreach_packed_sad(found, others).tolist() == expected
    assert sum(expected) > 4000


@pytest.mark.parametrize("at", [(2, 65, 1, 1, False), (2, 4, 2, 1, False), (2, 4, 1, 3, False)])
def test_numbers_that_make_no_groups_are_refused(at: Any) -> None:
    with pytest.raises(ValueError, match=r"1 <= N <= M <= 64|does not fit"):
        masks.foreach_prune([torch.ones(4, 8)], *at[:2], list(at[2:]))


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient \(4, 4\).*weight \(8, 4\)"):
        masks.foreach_decay([torch.zeros(4, 4)], [torch.ones(8, 4)], 0.5, 1, 4, AT)
