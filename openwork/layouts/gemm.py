"""How kernels want a compressed weight in memory. Made from the dense weight when a layer is deployed, never stored.

    O = outputs, K = inputs, T = slots of one output, L = lanes of a vector, m and n as in the pattern

Three layouts, for products whose lanes are different things (csrc/panel.inl, csrc/rows.inl, csrc/dots.inl):

    Panel   lanes are columns of the input (tokens, pixels): many of them. Any pattern.
    Rows    lanes are outputs: one input or a few. M in 2, 4, 8, 16, 32.
    Dots    lanes are outputs, inputs as short as the weights: bfloat16 or int8. M in 2, 4, 8, 16, and 32 with even N.

All keep N slots of every group, zeros included, so all outputs have equally many and no pointers are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group, magnitude_mask
from openwork.nm.pattern import Pattern

_CACHE = 20 * 1024  # bytes of input that a tile may take of the first-level cache, of which 32 KiB are the smallest
_CACHE_WIDE = 28 * 1024  # with 128 columns, whose sums cost more: 5 to 10 % faster on Zen 4
_PART = 1 << 18  # weights that are packed at once: bounds temporary memory
_TOGETHER = {torch.bfloat16: 2, torch.int8: 4}  # numbers in 32 bits
WINDOWS = {2: 4, 4: 4, 8: 8, 16: 16, 32: 32}
"""M -> inputs that one permutation chooses from."""


@dataclass(frozen=True)
class Panel:
    """`values` (T * O,) float32, bfloat16, or int16 holding int8 weights; `positions` (T * O + 1,) int16 holding
    uint16.

    The order is tile, output, slot; `tile` inputs make a tile. A position is where the input is in its tile, in bytes:
    a tile has a row of `columns` numbers (float32, or int16 for int8 weights) for each input. `scales` (O,) are those
    of int8 weights.
    """

    values: Tensor
    positions: Tensor
    scales: Tensor | None
    pattern: Pattern
    shape: tuple[int, int]
    tile: int
    columns: int


@dataclass(frozen=True)
class Rows:
    """`values` (O / L, T, L) in float32 or int8, or (O / L, T / 2, L, 2) in bfloat16, two slots side by side;
    `words` (O / L, words, L) int32: indices, low bits first."""

    values: Tensor
    words: Tensor
    scales: Tensor | None
    pattern: Pattern
    shape: tuple[int, int]
    lanes: int


@dataclass(frozen=True)
class Dots:
    """`values` (O / L, windows, steps, L, 2) bfloat16 or (O / L, windows, steps, L, 4) int8: a window is one vector of
    inputs, a step the slots that one instruction multiplies and adds. `positions` uint8, where the input of each is in
    its window: like `values`, but for bfloat16 those of two steps side by side."""

    values: Tensor
    positions: Tensor
    scales: Tensor | None
    pattern: Pattern
    shape: tuple[int, int]
    lanes: int


def panel(weight: Tensor, pattern: Pattern, *, columns: int, scales: Tensor | None = None) -> Panel:
    """The panel layout of a weight (O, K) in float32, bfloat16, or int8 with its `scales`.

    `columns` are those that the kernel takes at once. Raises ValueError where a group holds more than N non-zeros.
    """
    _check_packable(weight)
    O, K = weight.shape
    int8 = weight.dtype == torch.int8
    tile, row = tile_of(weight.dtype, pattern, columns), columns * _input_bytes(weight.dtype)
    tiles = [
        slots_of(len(inputs), pattern, int8) for inputs in torch.arange(-(-K // pattern.m) * pattern.m).split(tile)
    ]
    total = O * sum(stored for _, stored in tiles)
    values = weight.new_zeros(total, dtype=torch.int16 if int8 else weight.dtype)
    positions = torch.zeros(total + 1, dtype=torch.int16, device=weight.device)
    for first, part, keep in _parts(weight, pattern, -K % pattern.m):
        at, outputs = 0, slice(first, first + len(part))
        for each, kept, (count, stored) in zip(part.split(tile, 1), keep.split(tile, 1), tiles, strict=True):
            place = slice(at, at + O * stored)
            values[place].view(O, stored)[outputs, :count] = each[kept].view(-1, count).to(values.dtype)
            position = torch.arange(each.shape[1], device=weight.device) * row
            wrapped = torch.where(position < 2**15, position, position - 2**16).to(torch.int16)
            positions[place].view(O, stored)[outputs, :count] = wrapped.expand_as(kept)[kept].view(-1, count)
            at += O * stored
    return Panel(values, positions, scales, pattern, (O, K), tile, columns)


def from_panel(layout: Panel) -> Tensor:
    """Inverse of `panel`: the dense weight (O, K), zeros filled in; of an int8 weight the int8 numbers."""
    O, K = layout.shape
    int8 = layout.values.dtype == torch.int16
    row = layout.columns * _input_bytes(torch.int8 if int8 else torch.float32)
    dense = layout.values.new_zeros(O, -(-K // layout.pattern.m) * layout.pattern.m)
    positions = (layout.positions.long() & 0xFFFF) // row
    at = 0
    for part in dense.split(layout.tile, dim=1):
        count, stored = slots_of(part.shape[1], layout.pattern, int8)
        values = layout.values[at : at + O * stored].view(O, stored)[:, :count]
        position = positions[at : at + O * stored].view(O, stored)[:, :count]
        part.scatter_(1, position, values)
        at += O * stored
    dense = dense[:, :K].contiguous()
    return dense.to(torch.int8) if int8 else dense


def slots_of(inputs: int, pattern: Pattern, int8: bool) -> tuple[int, int]:
    """Slots of one output in a tile of so many inputs, and how many are stored.

    >>> slots_of(24, Pattern(1, 8), int8=True)
    (3, 4)
    """
    count = inputs // pattern.m * pattern.n
    return count, count + (count % 2 if int8 else 0)


def tile_of(dtype: torch.dtype, pattern: Pattern, columns: int) -> int:
    """How many inputs make a tile, a multiple of M: so that what all outputs read stays in the cache."""
    # Of few products a tile the sums cost more than cache misses: sparser weights have larger tiles (measured).
    cache = max(_CACHE_WIDE if columns > 64 else _CACHE, _CACHE * (0.25 / pattern.density) ** 1.5)
    row = columns * _input_bytes(dtype)
    return max(1, int(min(0xFFFF, cache) // row) // pattern.m) * pattern.m  # positions have 16 bits


def conv_rows(weight: Tensor, pattern: Pattern) -> Tensor:
    """A convolution's weight (O, C, R, S) as that of a product: (O, R * S * C), channels innermost, C padded to M."""
    return torch.nn.functional.pad(weight.movedim(1, -1), (0, -weight.shape[1] % pattern.m)).flatten(1)


def from_conv_rows(rows: Tensor, channels: int, kernel: tuple[int, int]) -> Tensor:
    """Inverse of `conv_rows`: (O, R * S * C) -> (O, C, R, S)."""
    return rows.view(len(rows), *kernel, -1)[..., :channels].movedim(-1, 1).contiguous()


def rows(weight: Tensor, pattern: Pattern, *, lanes: int, scales: Tensor | None = None) -> Rows:
    """The rows layout of a weight (O, K) in float32, bfloat16, or int8 with its `scales`. Raises ValueError where a
    group holds more than N non-zeros, or for an M without a permutation."""
    if pattern.m not in WINDOWS:
        raise ValueError(f"M={pattern.m} has no layout by rows; needed one of {', '.join(map(str, WINDOWS))}")
    _check_packable(weight)
    (O, K), window = weight.shape, WINDOWS[pattern.m]
    values, words = [], []
    for _, part, keep in _parts(weight, pattern, -K % window, lanes):
        blocks, windows = len(part) // lanes, part.shape[1] // window
        kept = part[keep].view(blocks, lanes, -1).transpose(1, 2)
        values.append(_paired(kept) if weight.dtype == torch.bfloat16 else kept.contiguous())
        index = (torch.arange(part.shape[1], device=weight.device) % window).expand_as(keep)[keep]
        words.append(_words(index.view(blocks, lanes, windows, -1), window))
    return Rows(torch.cat(values), torch.cat(words), scales, pattern, (O, K), lanes)


def from_rows(layout: Rows) -> Tensor:
    """Inverse of `rows`: the dense weight, zeros filled in; of an int8 weight the int8 numbers."""
    O, K = layout.shape
    window = WINDOWS[layout.pattern.m]
    slots = window // layout.pattern.m * layout.pattern.n
    blocks, lanes, windows = layout.words.shape[0], layout.lanes, -(-K // window)
    index = _indices(layout.words, window, slots)[..., : windows * slots].reshape(blocks * lanes, windows, slots)
    values = layout.values.transpose(2, 3).flatten(1, 2) if layout.values.ndim == 4 else layout.values
    values = values[:, : windows * slots].transpose(1, 2).reshape(blocks * lanes, windows, slots)
    dense = values.new_zeros(blocks * lanes, windows, window).scatter_(2, index, values)
    return dense.view(blocks * lanes, -1)[:O, :K].contiguous()


def _paired(values: Tensor) -> Tensor:
    """(blocks, T, L) -> (blocks, T / 2 rounded up, L, 2)."""
    blocks, count, lanes = values.shape
    even = torch.nn.functional.pad(values, (0, 0, 0, count % 2))
    return even.reshape(blocks, -1, 2, lanes).transpose(2, 3).contiguous()


def dots(weight: Tensor, pattern: Pattern, *, lanes: int, scales: Tensor | None = None) -> Dots:
    """The dots layout of a weight (O, K) in bfloat16, or int8 with its `scales`. Raises ValueError where a group holds
    more than N non-zeros, or for an M that the vectors are no multiple of."""
    sizes = dots_sizes(weight.dtype, pattern, lanes)
    _check_packable(weight)
    values, positions = [], []
    for _, part, keep in _parts(weight, pattern, -weight.shape[1] % sizes.window, lanes):
        index = torch.arange(part.shape[1], dtype=torch.uint8, device=weight.device) % sizes.window
        each = (_steps(kept.view(-1, lanes, part.shape[1] // sizes.window, sizes.slots), sizes)
                for kept in (part[keep], index.expand_as(keep)[keep]))  # fmt: skip
        values.append(next(each).contiguous())
        positions.append(_two_steps(next(each)) if weight.dtype == torch.bfloat16 else next(each).contiguous())
    return Dots(torch.cat(values), torch.cat(positions), scales, pattern, (weight.shape[0], weight.shape[1]), lanes)


def from_dots(layout: Dots) -> Tensor:
    """Inverse of `dots`: the dense weight, zeros filled in; of an int8 weight the int8 numbers."""
    (O, K), lanes = layout.shape, layout.lanes
    sizes = dots_sizes(layout.values.dtype, layout.pattern, lanes)
    positions = layout.positions
    if layout.values.dtype == torch.bfloat16:
        positions = positions.view(*positions.shape[:2], -1, lanes * 2, 2).transpose(-1, -2)
        positions = positions.flatten(2, 3)[:, :, : sizes.steps].reshape(layout.values.shape)
    values, index = (each.permute(0, 3, 1, 2, 4).flatten(3) for each in (layout.values, positions))
    dense = values.new_zeros(*values.shape[:3], sizes.window).scatter_(3, index.long() % sizes.window, values)
    return dense.flatten(2).flatten(0, 1)[:O, :K].contiguous()


@dataclass(frozen=True)
class DotsSizes:
    """Inputs of a window; slots of one output in it; steps that take them, `together` a step."""

    window: int
    slots: int
    steps: int
    together: int


def dots_sizes(dtype: torch.dtype, pattern: Pattern, lanes: int) -> DotsSizes:
    """Raises ValueError where there is no such layout.

    >>> dots_sizes(torch.bfloat16, Pattern(2, 4), lanes=16)
    DotsSizes(window=32, slots=16, steps=8, together=2)
    """
    together = _TOGETHER.get(dtype, 0)
    if not has_dots_layout(dtype, pattern, lanes):
        raise ValueError(
            f"{dtype} at {pattern} has no layout by dots; needed bfloat16 or int8, M one of "
            f"{', '.join(map(str, WINDOWS))}, and slots that fill whole steps"
        )
    window = lanes * together
    slots = window // pattern.m * pattern.n
    return DotsSizes(window, slots, slots // together, together)


def has_dots_layout(dtype: torch.dtype, pattern: Pattern, lanes: int) -> bool:
    """Whether the slots of a window fill whole steps.

    >>> has_dots_layout(torch.int8, Pattern(1, 16), lanes=16), has_dots_layout(torch.int8, Pattern(1, 32), lanes=16)
    (True, False)
    """
    together = _TOGETHER.get(dtype, 0)
    if not together or pattern.m not in WINDOWS or lanes * together % pattern.m:
        return False
    return lanes * together // pattern.m * pattern.n % together == 0


def _steps(slots: Tensor, sizes: DotsSizes) -> Tensor:
    """(blocks, L, windows, slots) -> (blocks, windows, steps, L, together)."""
    return slots.unflatten(3, (sizes.steps, sizes.together)).permute(0, 2, 3, 1, 4)


def _two_steps(positions: Tensor) -> Tensor:
    """(blocks, windows, steps, L, 2) -> (blocks, windows, steps / 2 rounded up, L, 2, 2): the last those of two
    steps."""
    even = torch.nn.functional.pad(positions, (0, 0, 0, 0, 0, positions.shape[2] % 2))
    return even.unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3).contiguous()


def index_bits(window: int) -> int:
    """Bits of an index in a word: as many as the permutation reads, rounded up so that words divide evenly."""
    return {4: 2, 8: 4, 16: 4, 32: 8}[window]


def _words(index: Tensor, window: int) -> Tensor:
    """Indices (blocks, L, windows, slots) -> int32 (blocks, words, L). A word holds whole windows, or a window
    words."""
    bits = index_bits(window)
    in_word = 32 // bits
    slots = index.shape[-1]
    if slots > in_word:
        index = torch.nn.functional.pad(index, (0, -slots % in_word))
        index = index.reshape(*index.shape[:2], -1, in_word)
    else:
        together = in_word // slots
        index = torch.nn.functional.pad(index, (0, 0, 0, -index.shape[2] % together))
        index = index.reshape(*index.shape[:2], -1, together * slots)
    word = (index << torch.arange(index.shape[-1], device=index.device) * bits).sum(-1)
    return torch.where(word < 2**31, word, word - 2**32).to(torch.int32).transpose(1, 2).contiguous()


def _indices(words: Tensor, window: int, slots: int) -> Tensor:
    """Inverse of `_words`, spare bits left out: (blocks, words, L) -> int64 (blocks, L, slots in order)."""
    bits = index_bits(window)
    in_word = 32 // bits
    used = in_word // slots * slots if slots <= in_word else in_word
    index = (words.transpose(1, 2).long().unsqueeze(-1) >> torch.arange(used, device=words.device) * bits) & (
        window - 1
    )
    if slots > in_word:
        index = index.reshape(*index.shape[:2], -1, -(-slots // in_word) * in_word)[..., :slots]
    return index.flatten(2)


def _parts(weight: Tensor, pattern: Pattern, more: int, lanes: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some outputs at a time, so that packing takes little memory beside the weight: the first, their weights with
    `more` inputs and whole `lanes` of outputs, and which of them have slots."""
    together = max(1, _PART // (lanes * weight.shape[1])) * lanes
    for first, part in enumerate(weight.split(together)):
        padded = torch.nn.functional.pad(part, (0, more, 0, -len(part) % lanes))
        most = int(kept_per_group(padded, pattern, Axis(1)).max())
        if most > pattern.n:
            raise ValueError(f"a group of the weight {tuple(weight.shape)} holds {most} non-zeros; needed {pattern}")
        magnitude = padded.float().abs() if weight.dtype == torch.int8 else padded.abs()
        yield first * together, padded, magnitude_mask(magnitude, pattern, Axis(1))


def _input_bytes(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.int8 else 4


def _check_packable(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}; a layout needs one of outputs and inputs, at least one of each"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise TypeError(f"weight of {weight.dtype}; kernels take float32, bfloat16 and int8")
