"""The mask operators on every instruction set against `openwork.nm.masks`, bit by bit: any order, any bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.kernels.cpu import masks as native
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern

ops = torch.ops.openwork
AT = [1, 1, 0]  # Axis(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# The instruction set stays chosen while hypothesis draws.
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

patterns = st.one_of(st.sampled_from([2, 4, 8, 16, 32, 64]), st.integers(1, 64)).flatmap(
    lambda m: st.builds(Pattern, st.integers(1, m), st.just(m))
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


@functools.cache
def specials(dtype: torch.dtype) -> Tensor:
    """Zeros, the smallest and the largest numbers, infinities and NaNs of several payloads, of either sign."""
    kind = BITS[dtype]
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(kind))
    positive = torch.tensor(
        [0, 1, 2, infinity - 1, infinity, infinity + 1, infinity + 2, torch.iinfo(kind).max], dtype=kind
    )
    return torch.cat([positive, positive | torch.iinfo(kind).min])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, how: str) -> Tensor:
    """Bits of weights: few different magnitudes ("ties"), any number ("real"), any bits at all ("bits")."""
    generator = torch.Generator().manual_seed(seed)
    kind = BITS[dtype]
    if how == "ties":
        value = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    elif how == "real":
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        limits = torch.iinfo(kind)
        value = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=kind).view(dtype)
    at = torch.rand(shape, generator=generator) < (0.0 if how == "real" else 0.1)
    chosen = specials(dtype)[torch.randint(len(specials(dtype)), shape, generator=generator)]
    return torch.where(at, chosen, value.view(kind)).view(dtype)


def laid_out(weight: Tensor, order: tuple[int, ...], gap: str) -> Tensor:
    """The same numbers with their dims in memory in another order, or with gaps between them."""
    back = sorted(range(len(order)), key=lambda dim: order[dim])
    if gap == "none":
        return weight.permute(order).contiguous().permute(back)
    if gap == "slice":
        wide = torch.full([2 * size for size in weight.shape], 7.0, dtype=weight.dtype)
        part = wide[tuple(slice(None, None, 2) for _ in weight.shape)]
        part.copy_(weight)
        return part
    return weight[:1].expand(weight.shape)  # many rows in one place


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Pattern, Axis]:
    pattern = draw(patterns)
    kind = draw(st.sampled_from(["linear", "conv", "conv1d", "blocks", "flat", "three"]))
    K = draw(st.one_of(st.integers(0, 2 * pattern.m + 3), st.integers(1, 9).map(lambda groups: groups * pattern.m)))
    rows, spots = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    shape, axis = {
        "linear": ((rows, K), Axis(1)),
        "conv": ((rows, K, spots, draw(st.integers(1, 5))), Axis(1)),
        "conv1d": ((rows, K, spots), Axis(1)),
        "blocks": ((spots * K, rows, 3, 3), Axis(0, blocks=spots)),
        "flat": ((rows, K, spots), Axis(flat=True)),
        "three": ((spots, rows, K), Axis(2)),
    }[kind]
    if kind == "blocks" and not K:
        shape = (spots, rows, 3, 3)
    how, dtype = draw(st.sampled_from(["ties", "real", "bits"])), draw(st.sampled_from(DTYPES))
    weight = numbers(shape, dtype, draw(st.integers(0, 2**32 - 1)), how)
    order = tuple(draw(st.permutations(range(len(shape)))))
    gap = draw(st.sampled_from(["none", "none", "none", "slice", "expand"])) if rows else "none"
    return laid_out(weight, order, gap), pattern, axis


def where(pattern: Pattern, axis: Axis) -> tuple[Any, ...]:
    return pattern.n, pattern.m, [axis.dim, axis.blocks, int(axis.flat)]


def defined_decay(gradient: Tensor, weight: Tensor, rate: float, keep: Tensor) -> Tensor:
    """Each operation rounded to the dtype: gradient + (0 where kept, else rate * weight)."""
    return gradient + torch.where(keep, 0.0, weight * rate)


def same_or_nan(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but for what is not a number: which NaN arithmetic gives depends on the processor."""
    return bool((a.isnan() & b.isnan() | (bits(a) == bits(b))).all())


# --- against the definitions -------------------------------------------------------------------------------------


@many
@given(case=cases())
def test_keep_is_the_definition(isa: str, case: tuple[Tensor, Pattern, Axis]) -> None:
    weight, pattern, axis = case
    assert torch.equal(
        ops.foreach_mask([weight.abs()], *where(pattern, axis))[0], magnitude_mask(weight.abs(), pattern, axis)
    )


@many
@given(case=cases())
def test_prune_is_the_definition_bit_by_bit(isa: str, case: tuple[Tensor, Pattern, Axis]) -> None:
    weight, pattern, axis = case
    expected = torch.where(magnitude_mask(weight.abs(), pattern, axis), weight, 0.0)
    pruned = ops.foreach_prune([weight], *where(pattern, axis))[0]
    assert torch.equal(bits(pruned), bits(expected))
    reference = apply_mask(weight, torch.ones_like(weight, dtype=torch.bool))
    assert all(size == 1 or pruned.stride(dim) == reference.stride(dim) for dim, size in enumerate(weight.shape))


@many
@given(case=cases(), rate=st.sampled_from([0.0, 2e-4, 0.5, 1.0, 3.0]), alike=st.booleans())
def test_decay_is_the_definition_bit_by_bit(isa: str, case: Any, rate: float, alike: bool) -> None:
    weight, pattern, axis = case
    gradient = numbers(tuple(weight.shape), weight.dtype, 1, "bits")
    gradient = torch.empty_like(weight).copy_(gradient) if alike else gradient
    expected = defined_decay(gradient, weight, rate, magnitude_mask(weight.abs(), pattern, axis))
    before, out = gradient.clone(), torch.full_like(gradient, 7.0)
    if native.decay_into(out, gradient, weight, rate, pattern, axis):  # else nothing was written
        assert same_or_nan(out, expected)
    else:
        assert bool((out == 7.0).all())
    assert torch.equal(bits(gradient), bits(before))
    ops.foreach_decay([gradient], [weight], rate, *where(pattern, axis))
    assert same_or_nan(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((2, 8, 50, 41), Pattern(2, 4)),  # 2050 columns: a stretch of 8192 is less than a group
        ((1, 8, 2048), Pattern(1, 4)),
        ((1, 4, 2049), Pattern(3, 4)),
        ((2, 6, 4, 1025), Pattern(2, 4)),  # and the last group is short
        ((2, 64, 129), Pattern(5, 64)),
        ((1, 3, 2731), Pattern(2, 3)),
        ((3, 16, 511), Pattern(1, 8)),
    ],
)
def test_groups_larger_than_what_is_worked_on_at_once(
    isa: str, shape: Any, pattern: Pattern, dtype: torch.dtype
) -> None:
    weight, gradient = numbers(shape, dtype, 0, "ties"), numbers(shape, dtype, 1, "real")
    keep = magnitude_mask(weight.abs(), pattern, Axis(1))
    expected = defined_decay(gradient, weight, 0.5, keep)
    assert torch.equal(ops.foreach_mask([weight.abs()], *where(pattern, Axis(1)))[0], keep)
    ops.foreach_decay([gradient], [weight], 0.5, *where(pattern, Axis(1)))
    assert same_or_nan(gradient, expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_groups(isa: str, threads: int) -> None:
    weight, before = torch.randn(300, 1024), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (pruned,), (keep,) = ops.foreach_prune([weight], 2, 4, AT), ops.foreach_mask([weight.abs()], 3, 8, AT)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(pruned, torch.where(magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1)), weight, 0.0))
    assert torch.equal(keep, magnitude_mask(weight.abs(), Pattern(3, 8), Axis(1)))


# --- which way a weight takes --------------------------------------------------------------------------------------

IN_MEMORY = [
    (torch.zeros(6, 8), Axis(1), (6, 8, 1)),
    (torch.zeros(6, 8).t(), Axis(1), (1, 6, 8)),
    (torch.zeros(6, 8, 3, 5), Axis(1), (6, 8, 15)),
    (torch.zeros(6, 8, 3, 5).to(memory_format=torch.channels_last), Axis(1), (90, 8, 1)),
    (torch.zeros(6, 8, 3), Axis(0, blocks=2), (2, 3, 24)),
    (torch.zeros(6, 8, 3), Axis(flat=True), (1, 144, 1)),
    (torch.zeros(6, 1, 3), Axis(1), (6, 1, 3)),
    (torch.zeros(6, 8)[:, :4], Axis(1), None),
    (torch.zeros(1, 8).expand(6, 8), Axis(1), None),
    (torch.zeros(6, 8).t(), Axis(flat=True), None),
]


@pytest.mark.parametrize(("weight", "axis", "expected"), IN_MEMORY)
def test_how_groups_lie_in_memory(weight: Tensor, axis: Axis, expected: Any) -> None:
    found = native.groups_in_memory(weight, 2, 4, axis)
    assert (found and (found.outer, found.length, found.inner, found.n, found.m)) == (expected and (*expected, 2, 4))


def test_weights_that_lie_alike_are_looked_at_once() -> None:
    a, b, c = torch.zeros(8, 16), torch.ones(8, 16), torch.zeros(16, 8).t()
    assert native.groups_in_memory(a, 2, 4, Axis(1)) is native.groups_in_memory(b, 2, 4, Axis(1))
    other = native.groups_in_memory(c, 2, 4, Axis(1))
    assert other is not None
    assert (other.outer, other.length, other.inner) == (1, 16, 8)


@pytest.mark.parametrize("function", ["magnitude_mask", "apply_mask", "add_decay"])
def test_weights_in_one_stretch_are_not_left_to_the_reference(isa: str, monkeypatch: Any, function: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(native, function, refuse)
    for weight, axis, expected in IN_MEMORY:
        if expected:
            at = where(Pattern(2, 4), axis)
            for call in (ops.foreach_mask, ops.foreach_prune):
                call([weight], *at)
            ops.foreach_decay([torch.empty_like(weight)], [weight], 0.1, *at)


def test_without_the_library_the_reference_runs(no_library: None) -> None:
    weight = torch.randn(4, 8)
    gradient = torch.zeros(4, 8)
    keep = magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1))
    assert torch.equal(ops.foreach_mask([weight.abs()], 2, 4, AT)[0], keep)
    assert torch.equal(ops.foreach_prune([weight], 2, 4, AT)[0], torch.where(keep, weight, 0.0))
    ops.foreach_decay([gradient], [weight], 1.0, 2, 4, AT)
    assert torch.equal(gradient, torch.where(keep, 0.0, weight))


# --- what cannot be done is said -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "complaint"),
    [
        ((2, 0, 1, 1, False), "1 <= N <= M <= 64"),
        ((0, 4, 1, 1, False), "1 <= N <= M <= 64"),
        ((5, 4, 1, 1, False), "1 <= N <= M <= 64"),
        ((2, 65, 1, 1, False), "1 <= N <= M <= 64"),
        ((2, 10**9, 1, 1, False), "1 <= N <= M <= 64"),
        ((2, 4, 2, 1, False), "does not fit"),
        ((2, 4, -3, 1, False), "does not fit"),
        ((2, 4, 1, 0, False), "does not fit"),
        ((2, 4, 1, 3, False), "does not fit"),
        ((2, 4, 1, -1, False), "does not fit"),
    ],
)
@pytest.mark.parametrize("name", ["foreach_mask", "foreach_prune", "foreach_decay"])
def test_numbers_that_make_no_groups_are_refused(name: str, at: Any, complaint: str) -> None:
    weight = torch.ones(4, 8)
    arguments = ([torch.zeros(4, 8)], [weight], 0.5) if name == "foreach_decay" else ([weight],)
    with pytest.raises((ValueError, IndexError, RuntimeError), match=complaint):
        getattr(ops, name)(*arguments, *at[:2], list(at[2:]))


def test_a_gradient_of_another_shape_is_refused(isa: str) -> None:
    weight = torch.ones(8, 4)
    for gradient in (torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(0, 4)):  # the same strides
        with pytest.raises(ValueError, match=r"gradient \(\d, 4\).*weight \(8, 4\)"):
            ops.foreach_decay([gradient], [weight], 0.5, 1, 4, AT)


def test_dtypes_without_an_order_are_refused(isa: str) -> None:
    with pytest.raises(TypeError, match="int32"):
        ops.foreach_mask([torch.ones(4, 8, dtype=torch.int32)], 2, 4, AT)
