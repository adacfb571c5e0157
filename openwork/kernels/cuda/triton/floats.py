"""Floats as integers of their width, and back: so that every bit survives, and rounding is the same everywhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
WORDS = {torch.float32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.int16}
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def to_float32(bits, KIND: tl.constexpr):
    """What integers mean as KIND."""
    if KIND == tl.bfloat16:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == tl.float16:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = bits.to(tl.float32, bitcast=True)
    return number


@triton.jit
def rounded(number, KIND: tl.constexpr):
    """The bits of a float32 as KIND, rounded to even. In integers for bfloat16: Triton's interpreter truncates."""
    if KIND == tl.bfloat16:
        word = number.to(tl.int32, bitcast=True)
        even = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        bits = tl.where(number == number, even, 0x7FC0).to(tl.int16)
    elif KIND == tl.float16:
        bits = number.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = number.to(tl.int32, bitcast=True)
    return bits
