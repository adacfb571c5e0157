"""Packing: against a definition that is slow and obvious, bit for bit, and against bytes that nobody packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openwork.files import packing
from openwork.files.packing import (
    check_packed,
    pack_reference,
    pack_weight,
    packed_shape,
    unpack_into,
    unpack_reference,
    unpack_weight,
    uses_bitmask,
)
from openwork.nm.groups import Axis, to_rows
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = sorted(packing.PACKABLE, key=str)
NOTED = ["2:4", "1:4", "3:7", "1:16", "32:64", "3:4", "1:1", "5:5", "1:2", "64:64", "1:64", "4:8", "5:33"]


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(INTEGERS[weight.itemsize])


def packed_by_definition(weight: torch.Tensor, pattern: Pattern, axis: Axis) -> tuple[list[int], bytes]:
    """(the bits of the values, the index bytes), from the words of docs/format.md, one weight at a time."""
    width = math.ceil(math.log2(pattern.m)) if pattern.m > 1 else 0
    rows = to_rows(bits_of(weight), axis)
    values, stream = [], []
    for row in rows.reshape(-1, rows.shape[-1]).tolist():
        for start in range(0, len(row), pattern.m):
            group = row[start : start + pattern.m]
            group += [0] * (pattern.m - len(group))
            slots = [i for i, bits in enumerate(group) if bits]
            free = [i for i, bits in enumerate(group) if not bits]
            slots = sorted(slots + free[: pattern.n - len(slots)])
            assert len(slots) == pattern.n
            values += [group[i] for i in slots]
            if pattern.m < pattern.n * width:
                stream += [int(i in slots) for i in range(pattern.m)]
            else:
                stream += [i >> bit & 1 for i in slots for bit in range(width)]
    stream += [0] * (-len(stream) % 8)
    return values, bytes(sum(stream[i + bit] << bit for bit in range(8)) for i in range(0, len(stream), 8))


def sparse_bits(shape: tuple[int, ...], dtype: torch.dtype, pattern: Pattern, axis: Axis, seed: int) -> torch.Tensor:
    """A weight of random bits, NaN payloads and -0.0 among them, with at most N per group that are not all zero."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integer)
    bits[torch.rand(shape, generator=generator) < 0.1] = limits.min  # -0.0 in the float formats
    keep = magnitude_mask(torch.rand(shape, generator=generator), pattern, axis)
    keep &= torch.rand(shape, generator=generator) < 0.8  # fewer than N in some groups
    return (bits * keep).view(dtype)


patterns = st.one_of(
    st.sampled_from([Pattern.parse(text) for text in NOTED]),
    st.integers(1, 64).flatmap(lambda m: st.integers(1, m).map(lambda n: Pattern(n, m))),
)
placed = st.one_of(
    st.tuples(st.tuples(st.integers(1, 5), st.integers(1, 130)), st.sampled_from([Axis(1), Axis(0), Axis(flat=True)])),
    st.tuples(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3)), st.sampled_from([Axis(1), Axis(2)])),
    st.tuples(
        st.tuples(st.integers(1, 9).map(lambda k: 3 * k), st.integers(1, 3), st.integers(1, 2)),
        st.just(Axis(0, blocks=3)),
    ),
)


@settings(deadline=None, max_examples=150)
@given(pattern=patterns, place=placed, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_packing_is_the_definition_and_loses_no_bit(pattern, place, dtype, seed):
    shape, axis = place
    weight = sparse_bits(shape, dtype, pattern, axis, seed)
    values, indices = pack_weight(weight, pattern, axis)
    slow_values, slow_indices = packed_by_definition(weight, pattern, axis)
    assert bits_of(values).reshape(-1).tolist() == slow_values
    assert bytes(indices.numpy()) == slow_indices
    assert (tuple(values.shape), len(indices)) == packed_shape(shape, pattern, axis)
    back = unpack_weight(values, indices, pattern, axis, shape)
    assert back.dtype == dtype
    assert back.shape == shape
    assert back.is_contiguous()
    assert torch.equal(bits_of(back), bits_of(weight))


@pytest.mark.parametrize("text", NOTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
def test_the_patterns_of_the_issue(text, dtype):
    pattern = Pattern.parse(text)
    for k in (64, 65, 7, 1, 130):  # whole groups and remainders
        weight = sparse_bits((3, k), dtype, pattern, Axis(1), seed=k)
        values, indices = pack_weight(weight, pattern, Axis(1))
        groups = 3 * -(-k // pattern.m)
        assert values.numel() == groups * pattern.n
        assert len(indices) == -(-groups * pattern.index_bits // 8)
        assert torch.equal(bits_of(unpack_weight(values, indices, pattern, Axis(1), (3, k))), bits_of(weight))


@pytest.mark.parametrize("text", ["2:4", "3:7", "1:16", "5:33", "1:1"])
def test_chunks_leave_no_seam(monkeypatch, text):
    pattern = Pattern.parse(text)
    weight = sparse_bits((5, 13 * pattern.m), torch.float32, pattern, Axis(1), seed=1)
    whole = pack_weight(weight, pattern, Axis(1))
    monkeypatch.setattr(packing, "_CHUNK", 8)
    pieces = pack_weight(weight, pattern, Axis(1))
    assert torch.equal(bits_of(whole[0]), bits_of(pieces[0]))
    assert torch.equal(whole[1], pieces[1])
    assert torch.equal(bits_of(unpack_weight(*pieces, pattern, Axis(1), tuple(weight.shape))), bits_of(weight))


def test_bits_of_a_group_are_as_few_as_promised():
    for m in range(1, 65):
        for n in range(1, m + 1):
            indices = n * math.ceil(math.log2(m)) if m > 1 else 0
            assert Pattern(n, m).index_bits == min(indices, m)
            assert uses_bitmask(Pattern(n, m)) == (m < indices)
    assert packed_shape((8, 64), Pattern(32, 64), Axis(1)) == ((8, 32), 64)
    assert packed_shape((8, 64), Pattern(1, 16), Axis(1)) == ((8, 4), 16)


def test_a_kept_minus_zero_and_nan_payloads_stay():
    nan = torch.tensor([0x7FC12345, -0x3EDCBB], dtype=torch.int32).view(torch.float32)  # one of either sign
    weight = torch.tensor([[-0.0, 0.0, 0.0, 1.0, 0.0, nan[0], nan[1], 0.0]])
    weight[0, 5:7] = nan
    values, indices = pack_weight(weight, Pattern(2, 4), Axis(1))
    assert torch.equal(bits_of(unpack_weight(values, indices, Pattern(2, 4), Axis(1), (1, 8))), bits_of(weight))


def test_a_minus_zero_without_a_slot_is_refused_and_project_repairs_it():
    weight = torch.tensor([[1.0, -0.0, 2.0, 0.0]])
    with pytest.raises(ValueError, match=r"1 of 1 group holds .*-0\.0.*ow\.project"):
        pack_weight(weight, Pattern(2, 4), Axis(1))
    pack_weight(apply_mask(weight, magnitude_mask(weight.abs(), Pattern(2, 4), Axis(1))), Pattern(2, 4), Axis(1))


def test_too_dense_groups_are_counted(monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 8)
    weight = torch.zeros(8, 8)
    weight[1, :3] = weight[7, 4:] = 1.0
    with pytest.raises(ValueError, match=r"2 of 16 groups hold more than 2 of 4"):
        pack_weight(weight, Pattern(2, 4), Axis(1))


def test_strides_do_not_matter():
    weight = sparse_bits((8, 16, 3, 3), torch.float32, Pattern(2, 4), Axis(1), seed=3)
    last = weight.contiguous(memory_format=torch.channels_last)
    for a, b in zip(
        pack_weight(weight, Pattern(2, 4), Axis(1)), pack_weight(last, Pattern(2, 4), Axis(1)), strict=True
    ):
        assert torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize(
    ("shape", "axis", "complaint"),
    [
        ((0, 4), Axis(1), "empty"),
        ((), Axis(0), "scalar"),
        ((4, 4), Axis(2), "does not fit"),
        ((4, 4), Axis(-1), "does not fit"),
        ((4, 4), Axis(0, blocks=3), "does not fit"),
        ((4, 4), Axis(0, blocks=0), "does not fit"),
        ((-4, 4), Axis(1), "empty"),
    ],
)
def test_shapes_without_groups_are_refused(shape, axis, complaint):
    with pytest.raises(ValueError, match=complaint):
        packed_shape(shape, Pattern(2, 4), axis)


def test_shapes_of_any_size_cost_nothing():
    assert packed_shape((10**18, 10**18), Pattern(1, 64), Axis(1))[1] > 10**33


# --- the native library against numpy ----------------------------------------------------------------------------

# The instruction set stays chosen while hypothesis draws.
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def elsewhere(weight: torch.Tensor, how: str) -> torch.Tensor:
    """The same bits with the dims in the opposite order in memory, or with gaps between them."""
    if how == "turned":
        order = tuple(reversed(range(weight.ndim)))
        return weight.permute(order).contiguous().permute(order)
    if how == "gaps":
        wide = torch.zeros([2 * size for size in weight.shape], dtype=INTEGERS[weight.itemsize])
        part = wide[(slice(None, None, 2),) * weight.ndim]
        return part.copy_(bits_of(weight)).view(weight.dtype)
    return weight


@many
@given(
    pattern=patterns,
    place=placed,
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(["as it is", "turned", "gaps"]),
    seed=st.integers(0, 2**32),
)
def test_the_library_packs_as_numpy_does(isa, pattern, place, dtype, how, seed):
    shape, axis = place
    weight = sparse_bits(shape, dtype, pattern, axis, seed)
    values, indices = pack_weight(elsewhere(weight, how), pattern, axis)
    slow = pack_reference(weight, pattern, axis)
    assert torch.equal(bits_of(values), bits_of(slow[0]))
    assert torch.equal(indices, slow[1])
    check_packed(values, indices, pattern, axis, shape)
    target = elsewhere(torch.ones(shape, dtype=INTEGERS[dtype.itemsize]).view(dtype), how)
    strides = target.stride()
    unpack_into(target, values, indices, pattern, axis)
    assert target.stride() == strides
    assert torch.equal(bits_of(target), bits_of(weight))
    assert torch.equal(bits_of(unpack_reference(*slow, pattern, axis, shape)), bits_of(weight))


@many
@given(pattern=patterns, place=placed, dtype=st.sampled_from(DTYPES), data=st.data())
def test_the_library_refuses_what_numpy_refuses(isa, pattern, place, dtype, data):
    shape, axis = place
    values, indices = pack_weight(sparse_bits(shape, dtype, pattern, axis, seed=0), pattern, axis)
    for _ in range(data.draw(st.integers(1, 3))):
        if len(indices) and data.draw(st.booleans()):
            indices[data.draw(st.integers(0, len(indices) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        else:
            bits = bits_of(values).view(-1)
            bits[data.draw(st.integers(0, len(bits) - 1))] = data.draw(st.sampled_from([0, 1]))

    def read_by(read):
        try:
            return read(values, indices, pattern, axis, shape)
        except ValueError as error:
            return str(error)

    found = [read_by(read) for read in (unpack_reference, unpack_weight, check_packed)]
    if isinstance(found[0], str):
        assert found == [found[0]] * 3
    else:
        assert found[2] is None
        assert torch.equal(bits_of(found[0]), bits_of(found[1]))


def test_large_weights_are_packed_in_parts_by_threads(isa):
    weight = sparse_bits((700, 1000), torch.float32, Pattern(2, 4), Axis(1), seed=3)
    torch.set_num_threads(2)
    try:
        values, indices = pack_weight(weight, Pattern(2, 4), Axis(1))
        back = unpack_weight(values, indices, Pattern(2, 4), Axis(1), (700, 1000))
        weight[699, :] = weight[0, :] = 1.0
        with pytest.raises(ValueError, match="500 of 175000 groups hold more than 2 of 4"):
            pack_weight(weight, Pattern(2, 4), Axis(1))
    finally:
        torch.set_num_threads(1)
    slow = pack_reference(back, Pattern(2, 4), Axis(1))
    assert torch.equal(bits_of(values), bits_of(slow[0]))
    assert torch.equal(indices, slow[1])
    values[699, 3] = 0.0  # a spare slot, rarely the lowest: all of it is looked at
    indices[-1] ^= 0xFF
    with pytest.raises(ValueError, match="damaged"):
        check_packed(values, indices, Pattern(2, 4), Axis(1), (700, 1000))


@pytest.mark.parametrize("text", ["2:4", "3:7"])
def test_without_the_library_numpy_does_it(no_library, text):
    pattern = Pattern.parse(text)
    weight = sparse_bits((5, 45), torch.bfloat16, pattern, Axis(1), seed=2)
    values, indices = pack_weight(weight, pattern, Axis(1))
    check_packed(values, indices, pattern, Axis(1), (5, 45))
    assert torch.equal(bits_of(unpack_weight(values, indices, pattern, Axis(1), (5, 45))), bits_of(weight))
    indices[0] ^= 0xFF
    with pytest.raises(ValueError, match="damaged"):
        check_packed(values, indices, pattern, Axis(1), (5, 45))


# --- bytes that nobody packed ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(pattern=patterns, place=placed, data=st.data())
@example(pattern=Pattern(2, 4), place=((1, 8), Axis(1)), data=None)
def test_any_bytes_are_a_packing_or_refused(pattern, place, data):
    """What `unpack_weight` accepts is what `pack_weight` gives: one packing for one weight."""
    shape, axis = place
    size = packed_shape(shape, pattern, axis)[1]
    weight = sparse_bits(shape, torch.int8, pattern, axis, seed=0)
    values, indices = (each.clone() for each in pack_weight(weight, pattern, axis))
    if data is not None:
        for _ in range(data.draw(st.integers(1, 3))):
            if size and data.draw(st.booleans()):
                indices[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
            else:
                values.view(-1)[data.draw(st.integers(0, values.numel() - 1))] = data.draw(st.sampled_from([0, 1]))
    try:
        found = unpack_weight(values, indices, pattern, axis, shape)
    except ValueError:
        return
    again = pack_weight(found, pattern, axis)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], indices)


def tampered(values: list[int], codes: list[int], text: str, k: int) -> None:
    pattern = Pattern.parse(text)
    unpack_weight(
        torch.tensor([values], dtype=torch.int8), torch.tensor(codes, dtype=torch.uint8), pattern, Axis(1), (1, k)
    )


@pytest.mark.parametrize(
    ("values", "codes", "text", "k", "complaint"),
    [
        ([1, 2], [0b0000], "2:4", 4, "ascending"),  # 0 0: duplicate
        ([1, 2], [0b0001], "2:4", 4, "ascending"),  # 1 0: descending
        ([1], [7], "1:7", 7, "below M=7"),
        ([1, 2], [0b111_000], "2:7", 7, "below M=7"),
        ([1, 2], [0b1_0100], "2:4", 4, "after the last group"),
        ([1, 2, 3], [0b1011], "3:4", 4, None),
        ([1, 2, 3], [0b1111], "3:4", 4, "bitmask"),
        ([1, 2, 3], [0b0011], "3:4", 4, "bitmask"),
        ([1, 0], [0b1100], "2:4", 4, "spare slot"),  # 0 3, the 0 at 3: 1 was free
        ([1, 0], [0b0100], "2:4", 4, None),
        ([1, 2], [0b1100], "2:4", 3, "past the end"),
        ([1, 2], [0b1000], "2:4", 3, None),
        ([1], [0, 0], "1:4", 4, r"indices are torch.uint8 \(2,\)"),
        ([1, 1], [0], "1:4", 4, r"values are torch.int8 \(1, 2\)"),
    ],
)
def test_each_rule_of_indices(values, codes, text, k, complaint):
    if complaint is None:
        tampered(values, codes, text, k)
    else:
        with pytest.raises(ValueError, match=complaint):
            tampered(values, codes, text, k)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"torch\.bool"):
        pack_weight(torch.zeros(4, 4, dtype=torch.bool), Pattern(2, 4), Axis(1))
    with pytest.raises(ValueError, match=r"torch\.bool"):
        unpack_weight(
            torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.uint8), Pattern(2, 4), Axis(1), (1, 4)
        )
    with pytest.raises(ValueError, match=r"torch\.int8"):
        unpack_weight(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int8), Pattern(2, 4), Axis(1), (1, 4))


def test_results_own_their_memory():
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    values, indices = pack_weight(weight, Pattern(2, 4), Axis(1))
    back = unpack_weight(values, indices, Pattern(2, 4), Axis(1), (1, 4))
    back += 1
    assert values.tolist() == [[1.0, 2.0]]
    assert np.shares_memory(values.numpy(), weight.numpy()) is False
