"""Dense weight <-> (values, indices): the executable definition of how the format stores one weight.

    R = rows, K = weights in a row, G = groups in all rows, M = group size, N = slots in a group
    S = slots in all groups, W = w = bits of an index

Each group of M has N slots. They hold, in index order, every weight whose bits are not all zero, and where those are
fewer than N, +0.0 at the lowest other indices. A short last group counts as filled up with +0.0 to M. So one weight has
exactly one packing, and every bit survives: NaN payloads, and -0.0 as long as it finds a slot.

The indices of a group are one code of `Pattern.index_bits` bits: N indices of w = ceil(log2 M) bits, or a bitmask of M
bits where that is strictly smaller. The codes of all groups follow one another in one stream of bytes, low bits first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from openwork.kernels.cpu.compress import compress, expand
from openwork.kernels.cpu.native import isa
from openwork.nm.groups import Axis, from_rows, reduction_size, to_rows
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_prune
from openwork.utils.counted import counted

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
PACKABLE = frozenset((*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
"""The dtypes in which a zero is nothing but zero bits."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 14  # groups worked on at once, which bounds temporary memory; 8 of them end at a whole byte


def pack_weight(
    weight: Tensor,
    pattern: Pattern,
    axis: Axis,
    *,
    prune: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Values (leading dims of `to_rows`, slots in a row) in the weight's dtype, and indices (bytes,) in uint8, on the
    CPU.

    `prune`: those of `openwork.ops.foreach_prune(weight)`, a float weight. `into`: tensors that this made before, whose
    memory is used again where it fits. Raises ValueError where a group holds more than N weights whose bits are not all
    zero (-0.0 is such a weight).

    >>> values, indices = pack_weight(torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 0.0, 0.0, 0.0]]), Pattern(2, 4), Axis(1))
    >>> values.tolist(), indices.tolist()  # 1 3, 0 1 in 2 bits each, low bits first: 0b01_00_11_01
    ([[5.0, 6.0, 7.0, 0.0]], [77])
    """
    if weight.dtype not in PACKABLE:
        raise TypeError(f"weight of {weight.dtype}; needed one of {', '.join(sorted(map(str, PACKABLE)))}")
    values_shape, index_bytes = packed_shape(tuple(weight.shape), pattern, axis)
    values, indices = into or (None, None)
    if values is None or indices is None or (values.shape, values.dtype) != (values_shape, weight.dtype):
        values, indices = torch.empty(values_shape, dtype=weight.dtype), torch.empty(index_bytes, dtype=torch.uint8)
    rows = to_rows(weight.detach().cpu(), axis).contiguous()
    crowded = compress(rows, values, indices, pattern, prune=prune)
    if crowded is None:
        return pack_reference(foreach_prune([weight.detach()], pattern, [axis])[0] if prune else weight, pattern, axis)
    if crowded:
        raise _too_full(crowded, rows.shape, pattern)
    return values, indices


def pack_reference(weight: Tensor, pattern: Pattern, axis: Axis) -> tuple[Tensor, Tensor]:
    """`pack_weight` in numpy."""
    values_shape, index_bytes = packed_shape(tuple(weight.shape), pattern, axis)
    bits_GM = _groups(weight, pattern, axis)
    values_GN = np.empty((len(bits_GM), pattern.n), bits_GM.dtype)
    indices, crowded = np.empty(index_bytes, np.uint8), 0
    for start in range(0, len(bits_GM), _CHUNK):
        part_GM = bits_GM[start : start + _CHUNK]
        more = int((_count(part_GM != 0) > pattern.n).sum())
        crowded += more
        if not more:
            slot_GM = _slots(part_GM != 0, pattern.n)
            at = np.flatnonzero(slot_GM)
            values_GN[start : start + _CHUNK] = part_GM.reshape(-1)[at].reshape(-1, pattern.n)
            code = np.packbits(slot_GM if uses_bitmask(pattern) else _index_bits(at, pattern), bitorder="little")
            first = start * pattern.index_bits // 8
            indices[first : first + len(code)] = code
    if crowded:
        raise _too_full(crowded, bits_GM.shape, pattern)
    return torch.from_numpy(values_GN).view(weight.dtype).reshape(values_shape), torch.from_numpy(indices)


def _too_full(crowded: int, rows: Sequence[int], pattern: Pattern) -> ValueError:
    groups = math.prod(rows[:-1]) * -(-rows[-1] // pattern.m)
    return ValueError(
        f"{crowded} of {counted(groups, 'group')} {'holds' if crowded == 1 else 'hold'} more than {pattern.n} of "
        f"{pattern.m} weights whose bits are not all zero (-0.0 is such a weight); ow.project makes them fit, "
        "and makes pruned -0.0 into +0.0"
    )


def unpack_weight(values: Tensor, indices: Tensor, pattern: Pattern, axis: Axis, shape: tuple[int, ...]) -> Tensor:
    """The dense weight of `shape` that `pack_weight` made these of: bit for bit, contiguous, on the CPU.

    Both tensors may come from anyone. Raises ValueError unless they are exactly what `pack_weight` gives for the
    weight they describe: shapes, order and range of indices, one way to use spare slots, no bit set past an end.

    >>> unpack_weight(torch.tensor([[8.0]]), torch.tensor([2], dtype=torch.uint8), Pattern(1, 4), Axis(1), (1, 4))
    tensor([[0., 0., 8., 0.]])
    """
    check_shapes(values, indices, pattern, axis, shape)
    weight = torch.empty(shape, dtype=values.dtype)
    unpack_into(weight, values, indices, pattern, axis)
    return weight


def check_packed(values: Tensor, indices: Tensor, pattern: Pattern, axis: Axis, shape: tuple[int, ...]) -> None:
    """Raise what `unpack_weight` would, without making the weight."""
    check_shapes(values, indices, pattern, axis, shape)
    rows = (*values.shape[:-1], reduction_size(shape, axis))
    if not expand(None, rows, values.cpu().contiguous(), indices.cpu().contiguous(), pattern):
        unpack_reference(values, indices, pattern, axis, shape)


def check_while_read(
    indices: Tensor, pattern: Pattern, axis: Axis, shape: tuple[int, ...]
) -> tuple[Callable[[Tensor, int], None], Callable[[Tensor], None]]:
    """`check_packed` of values that come piece by piece: what to call with the values and how many bytes of them are
    there, and at the end what raises."""
    checked, sound = 0, True

    def seen(values: Tensor, bytes_there: int) -> None:
        nonlocal checked, sound
        there = bytes_there // (pattern.n * values.itemsize)
        stop = there if there * pattern.n == values.numel() else there // 8 * 8
        rows = (*values.shape[:-1], reduction_size(shape, axis))
        if sound and stop > checked:
            sound = bool(expand(None, rows, values, indices, pattern, (checked, stop)))
        checked = stop

    def end(values: Tensor) -> None:
        if not sound:
            unpack_reference(values, indices, pattern, axis, shape)

    return seen, end


def unpack_into(weight: Tensor, values: Tensor, indices: Tensor, pattern: Pattern, axis: Axis) -> None:
    """Write what `unpack_weight` gives into a tensor of that shape and dtype on the CPU, whatever its strides. Raises
    as `unpack_weight` does; the tensor may be half written then. It does not raise autograd's version."""
    bits, shape = integers(weight.detach()), tuple(weight.shape)
    values, indices = values.cpu().contiguous(), indices.cpu().contiguous()
    direct = unpacks_in_place(weight, axis)
    rows = (
        to_rows(bits, axis)
        if direct
        else torch.empty((*values.shape[:-1], reduction_size(shape, axis)), dtype=bits.dtype)
    )
    if not expand(rows, tuple(rows.shape), values, indices, pattern):
        bits.copy_(integers(unpack_reference(values, indices, pattern, axis, shape)))
    elif not direct:
        bits.copy_(from_rows(rows, axis, shape))


def unpacks_in_place(weight: Tensor, axis: Axis) -> bool:
    """Whether `unpack_into` needs no memory beside the weight: its rows lie end to end."""
    rows = to_rows(weight.detach(), axis)
    return isa() is not None and weight.is_cpu and rows.is_contiguous() and rows.data_ptr() == weight.data_ptr()


def check_shapes(values: Tensor, indices: Tensor, pattern: Pattern, axis: Axis, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless both tensors have the shapes and dtypes of the format."""
    values_shape, index_bytes = packed_shape(shape, pattern, axis)
    if values.dtype not in PACKABLE or tuple(values.shape) != values_shape:
        problem = f"values are {values.dtype} {tuple(values.shape)}"
        raise ValueError(f"{problem}; a weight of shape {shape} at {pattern} has {values_shape}")
    if indices.dtype != torch.uint8 or tuple(indices.shape) != (index_bytes,):
        problem = f"indices are {indices.dtype} {tuple(indices.shape)}"
        raise ValueError(f"{problem}; a weight of shape {shape} at {pattern} has uint8 ({index_bytes},)")


def unpack_reference(values: Tensor, indices: Tensor, pattern: Pattern, axis: Axis, shape: tuple[int, ...]) -> Tensor:
    """`unpack_weight` in numpy, of tensors that have the right shapes. The native library only says that something is
    wrong; this says what."""
    K, values_shape = reduction_size(shape, axis), tuple(values.shape)
    values_GN = integers(values.cpu().contiguous()).reshape(-1, pattern.n).numpy()
    bits_GM = np.zeros((len(values_GN), pattern.m), values_GN.dtype)
    _fill(bits_GM, values_GN, indices.cpu().contiguous().numpy(), pattern)
    rows_RK = bits_GM.reshape(math.prod(values_shape[:-1]), -1)
    if rows_RK[:, K:].any():
        raise ValueError(f"values lie past the end of rows of {K} weights: the file is damaged")
    rows = torch.from_numpy(rows_RK[:, :K]).reshape(*values_shape[:-1], K)
    return from_rows(rows, axis, shape).contiguous().view(values.dtype)


def packed_shape(shape: tuple[int, ...], pattern: Pattern, axis: Axis) -> tuple[tuple[int, ...], int]:
    """Shape of the values and number of index bytes of a weight, by arithmetic alone: nothing is allocated.

    Raises ValueError where the axis does not fit the shape, or the weight is empty.

    >>> packed_shape((64, 32, 3, 3), Pattern(1, 16), Axis(1))
    ((64, 3, 3, 2), 576)
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"shape {shape}: an empty weight and a scalar have no groups; store it dense")
    if not axis.flat and not (0 <= axis.dim < len(shape) and axis.blocks >= 1 and shape[axis.dim] % axis.blocks == 0):
        raise ValueError(f"{axis} does not fit shape {shape}: needed one of its dims, cut into equal blocks")
    groups_in_row = -(-reduction_size(shape, axis) // pattern.m)
    blocks = (axis.blocks,) if axis.blocks > 1 else ()
    leading = (1,) if axis.flat else (*shape[: axis.dim], *blocks, *shape[axis.dim + 1 :])
    return (*leading, groups_in_row * pattern.n), -(-math.prod(leading) * groups_in_row * pattern.index_bits // 8)


def integers(tensor: Tensor) -> Tensor:
    """The same bits as integers of the same size, which numpy can hold whatever the dtype."""
    return tensor.view(_BITS[tensor.itemsize])


def uses_bitmask(pattern: Pattern) -> bool:
    """Whether a bitmask is strictly smaller than N indices.

    >>> uses_bitmask(Pattern(2, 4)), uses_bitmask(Pattern(3, 4)), uses_bitmask(Pattern(32, 64))
    (False, True, True)
    """
    return pattern.m < pattern.n * _index_width(pattern)


def _index_width(pattern: Pattern) -> int:
    return (pattern.m - 1).bit_length()


def _groups(weight: Tensor, pattern: Pattern, axis: Axis) -> np.ndarray:
    """The bits of a weight as integers (G, M), short groups filled up with zeros."""
    rows = to_rows(integers(weight.detach().cpu()), axis)
    if missing := -rows.shape[-1] % pattern.m:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.reshape(-1, pattern.m).numpy()


def _count(set_GM: np.ndarray) -> np.ndarray:
    """How many are set in each group: bool (G, M) -> uint8 (G,). (`sum` takes ten times as long where M is small.)"""
    return np.einsum("gm->g", set_GM.view(np.uint8))


def _slots(nonzero_GM: np.ndarray, n: int) -> np.ndarray:
    """Which N positions of each group are stored: bool (G, M). At most N may be non-zero; overwrites its argument."""
    count_G = _count(nonzero_GM)
    spare = np.flatnonzero(count_G < n)
    if len(spare):
        free_GM = ~nonzero_GM[spare]
        nth_GM = free_GM.cumsum(1, dtype=np.uint8)
        nonzero_GM[spare] |= free_GM & (nth_GM <= (n - count_G[spare])[:, None])
    return nonzero_GM


def _index_bits(at: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The bits of the index of each slot: positions (slots,) -> uint8 (slots, w), low bit first."""
    index = (at % pattern.m).astype(np.uint8)
    return np.unpackbits(index[:, None], axis=1, count=_index_width(pattern), bitorder="little")


def _positions(code: np.ndarray, groups: int, pattern: Pattern) -> np.ndarray:
    """Where the slots of some groups lie: bytes -> ascending positions (G * N,) in the groups laid end to end.

    Raises ValueError where an index is not below M, the indices of a group do not ascend, or a bitmask has not N bits.
    """
    used = groups * pattern.index_bits
    if used % 8 and code[-1] >> (used % 8):
        raise ValueError("indices have bits set after the last group: the file is damaged")
    bits = np.unpackbits(code, count=used, bitorder="little")
    if uses_bitmask(pattern):
        if (_count(bits.reshape(groups, pattern.m)) != pattern.n).any():
            raise ValueError(f"a bitmask does not have {pattern.n} of {pattern.m} bits set: the file is damaged")
        return np.flatnonzero(bits)
    bits_SW = bits.reshape(groups * pattern.n, _index_width(pattern))
    index_S = np.zeros(len(bits_SW), np.uint8)
    for place in range(bits_SW.shape[1]):
        index_S |= bits_SW[:, place] << place
    index_GN = index_S.reshape(groups, pattern.n)
    # One slot after the other: numpy's inner loop along so short an axis is five times as slow.
    descends = any((index_GN[:, slot] <= index_GN[:, slot - 1]).any() for slot in range(1, pattern.n))
    if descends or (index_S >= pattern.m).any():
        raise ValueError(f"indices are not ascending, or not below M={pattern.m}: the file is damaged")
    return (index_GN + np.arange(0, groups * pattern.m, pattern.m)[:, None]).reshape(-1)


def _fill(bits_GM: np.ndarray, values_GN: np.ndarray, code: np.ndarray, pattern: Pattern) -> None:
    """Put values where the indices say, and check that spare slots lie where `pack_weight` puts them."""
    for start in range(0, len(bits_GM), _CHUNK):
        part_GM, slots_GN = (tensor[start : start + _CHUNK] for tensor in (bits_GM, values_GN))
        first, last = (group * pattern.index_bits for group in (start, start + len(part_GM)))
        at = _positions(code[first // 8 : -(-last // 8)], len(part_GM), pattern)
        part_GM.reshape(-1)[at] = slots_GN.reshape(-1)
        spare = np.unique(np.flatnonzero(slots_GN == 0) // pattern.n)  # the groups with a slot that holds a zero
        if len(spare):
            _check_lowest(at.reshape(slots_GN.shape)[spare] - spare[:, None] * pattern.m, part_GM[spare], pattern)


def _check_lowest(index_GN: np.ndarray, part_GM: np.ndarray, pattern: Pattern) -> None:
    _, needed = np.nonzero(_slots(part_GM != 0, pattern.n))
    if not np.array_equal(needed, index_GN.reshape(-1)):
        raise ValueError("a spare slot is not at the lowest free index of its group: the file is damaged")
