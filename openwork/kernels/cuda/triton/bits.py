"""Topology in Triton: masks packed to bits, and how many bits of two packed masks differ, for a list in one launch.

B = bytes that one program makes or compares, T = tensors in a list
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from openwork.kernels.cuda.stream import capturing, on_device
from openwork.kernels.cuda.triton.launch import row_of, table
from openwork.ops.mask_stats import pack_reference, packed_sad_reference

B = 1024


@triton.jit(do_not_specialize=["tensors"])
def _pack(rows, tensors, B: tl.constexpr):
    """`rows` (T, 4) int64: first program, mask, bits (addresses), weights."""
    program = tl.program_id(0)
    row = rows + row_of(rows, tensors, program, 4) * 4
    mask = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    bits = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    weights = tl.load(row + 3)
    byte = (program - tl.load(row)) * B + tl.arange(0, B).to(tl.int64)
    packed = tl.zeros([B], tl.int32)
    for bit in tl.static_range(8):
        at = byte * 8 + bit
        packed += tl.load(mask + at, mask=at < weights, other=0).to(tl.int32) << bit
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < weights)


@triton.jit(do_not_specialize=["tensors"])
def _differ(rows, tensors, counts, B: tl.constexpr):
    """`rows` (T, 4) int64: first program, two addresses, bytes. `counts` (T,) int64, added to."""
    program = tl.program_id(0)
    which = row_of(rows, tensors, program, 4)
    row = rows + which * 4
    a = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    b = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    at = (program - tl.load(row)) * B + tl.arange(0, B).to(tl.int64)
    inside = at < tl.load(row + 3)
    x = tl.load(a + at, mask=inside, other=0).to(tl.int32) ^ tl.load(b + at, mask=inside, other=0).to(tl.int32)
    x -= (x >> 1) & 0x55
    x = (x & 0x33) + ((x >> 2) & 0x33)
    x = (x + (x >> 4)) & 0x0F
    tl.atomic_add(counts + which, tl.sum(x, axis=0).to(tl.int64))


def foreach_pack(masks: Sequence[Tensor]) -> list[Tensor]:
    """`openwork.nm.mask_stats.pack` of masks on one device."""
    if capturing(*masks):
        return pack_reference(list(masks))
    flat = [mask.reshape(-1).view(torch.uint8) for mask in masks]
    out = [torch.empty(-(-each.numel() // 8), dtype=torch.uint8, device=each.device) for each in flat]
    rows = [(mask.data_ptr(), bits.data_ptr(), mask.numel()) for mask, bits in zip(flat, out, strict=True)]
    counts = [-(-bits.numel() // B) for bits in out]
    if sum(counts):
        with on_device(flat[0].device):
            _pack[(sum(counts),)](table(rows, counts, flat[0].device), len(rows), B)
    return out


def foreach_packed_sad(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """`openwork.nm.mask_stats.packed_sad` of pairs on one device: int64 (T,)."""
    if capturing(*a):
        return packed_sad_reference(list(a), list(b))
    counts = torch.zeros(len(a), dtype=torch.int64, device=a[0].device)
    a, b = [each.contiguous() for each in a], [each.contiguous() for each in b]
    rows = [(x.data_ptr(), y.data_ptr(), x.numel()) for x, y in zip(a, b, strict=True)]
    blocks = [-(-x.numel() // B) for x in a]
    if sum(blocks):
        with on_device(a[0].device):
            _differ[(sum(blocks),)](table(rows, blocks, a[0].device), len(rows), counts, B)
    return counts
