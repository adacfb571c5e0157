"""Products of a few rows with a compressed weight on a GPU: layout, schema, reference, fake kernel.

    O = outputs, OP = O rounded up to 16, G = groups of one output, N = slots of a group, B = rows of input

One token at a time, a layer costs what reading its weight costs, so fewer bytes are less time, whatever the pattern.
Lanes are outputs: what neighbours read lies side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops.library import library, reference

ROWS = 16
"""The most rows of input that the kernels take."""

library.define(
    "thin_linear(Tensor x, Tensor values, Tensor words, Tensor? bias, int[] layout, bool expand, bool relu) -> Tensor"
)


@dataclass(frozen=True)
class Thin:
    """`values` (N, G, OP) in float16 or bfloat16; `words` (W, OP) int32: the indices of slots in the order of groups,
    `index_bits` each, as many in a word as fit, low bits first."""

    values: Tensor
    words: Tensor
    pattern: Pattern
    shape: tuple[int, int]

    @property
    def numbers(self) -> list[int]:
        """For the operator: n, m, outputs, inputs."""
        return [self.pattern.n, self.pattern.m, *self.shape]


def index_bits(pattern: Pattern) -> int:
    """Bits of one index.

    >>> index_bits(Pattern(2, 4)), index_bits(Pattern(1, 5)), index_bits(Pattern(1, 1))
    (2, 3, 1)
    """
    return max(1, (pattern.m - 1).bit_length())


def thin(weight: Tensor, pattern: Pattern) -> Thin:
    """The layout of a weight (O, K). Raises ValueError where a group holds more than N non-zeros."""
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"weight {tuple(weight.shape)} of {weight.dtype}; needed (O, K) in float16 or bfloat16")
    most = int(kept_per_group(weight, pattern, Axis(1)).max())
    if most > pattern.n:
        raise ValueError(f"a group of the weight {tuple(weight.shape)} holds {most} non-zeros; needed {pattern}")
    O, K = weight.shape
    padded = F.pad(weight, (0, -K % pattern.m, 0, -O % 16))
    keep = magnitude_mask(padded.abs(), pattern, Axis(1))
    position = torch.arange(padded.shape[1], device=weight.device) % pattern.m
    shape = (len(padded), -1, pattern.n)
    values = padded[keep].view(shape).permute(2, 1, 0).contiguous()
    return Thin(values, _words(position.expand_as(keep)[keep].view(shape), pattern), pattern, (O, K))


def from_thin(layout: Thin) -> Tensor:
    """Inverse of `thin`: the dense weight (O, K), zeros filled in."""
    m, (O, K), bits = layout.pattern.m, layout.shape, index_bits(layout.pattern)
    N, G, OP = layout.values.shape
    shifts = torch.arange(32 // bits, device=layout.words.device, dtype=torch.int32) * bits
    index = (layout.words.unsqueeze(1) >> shifts[:, None]) & ((1 << bits) - 1)
    index = index.flatten(0, 1)[: G * N].view(G, N, OP).permute(2, 0, 1)
    dense = layout.values.new_zeros(OP, G, m).scatter_(2, index.long(), layout.values.permute(2, 1, 0))
    return dense.view(OP, G * m)[:O, :K].contiguous()


def _words(index: Tensor, pattern: Pattern) -> Tensor:
    """Indices (OP, G, N) -> int32 (W, OP)."""
    bits = index_bits(pattern)
    flat = index.flatten(1)
    flat = F.pad(flat, (0, -flat.shape[1] % (32 // bits))).view(len(flat), -1, 32 // bits)
    word = (flat << torch.arange(32 // bits, device=index.device) * bits).sum(-1)
    return torch.where(word < 2**31, word, word - 2**32).to(torch.int32).t().contiguous()


def check_layout(x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, numbers: list[int]) -> None:
    """Raises ValueError unless the tensors are those of a layout, and `x` is rows for it: kernels look at nothing."""
    n, m, O, K = numbers
    pattern, OP = Pattern(n, m), -(-O // 16) * 16
    G, per = -(-K // m), 32 // index_bits(pattern)
    shapes = tuple(values.shape) == (n, G, OP) and tuple(words.shape) == (-(-G * n // per), OP)
    whole = values.is_contiguous() and words.is_contiguous() and words.dtype == torch.int32
    if not (shapes and whole and values.dtype in (torch.float16, torch.bfloat16)):
        found = f"values {tuple(values.shape)} of {values.dtype} and words {tuple(words.shape)} of {words.dtype}"
        raise ValueError(f"{found} do not fit the layout {numbers}: make them with openwork.ops.skinny")
    if x.ndim != 2 or x.shape[1] != K or x.dtype != values.dtype:
        raise ValueError(f"input {tuple(x.shape)} of {x.dtype}; needed (B, {K}) of {values.dtype}")
    if bias is not None and (tuple(bias.shape) != (O,) or bias.dtype != values.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} of {bias.dtype}; needed ({O},) of {values.dtype}")


@reference("thin_linear")
def thin_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, layout: list[int], expand: bool, relu: bool
) -> Tensor:
    check_layout(x, values, words, bias, layout)
    n, m, O, K = layout
    weight = from_thin(Thin(values, words, Pattern(n, m), (O, K)))
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (y.relu() if relu else y).to(x.dtype)


@torch.library.register_fake("openwork::thin_linear")
def _(x, values, words, bias, layout, expand, relu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], layout[2])
