"""Indices in 32-bit words, as tight as their bits allow: what a kernel reads beside the values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_words(index: Tensor, bits: int) -> Tensor:
    """Indices (..., S) int64 -> int32 (..., W): `bits` each, as many in a word as fit whole, low bits first.

    >>> pack_words(torch.tensor([[1, 2, 3]]), 16).tolist()
    [[131073, 3]]
    """
    in_word = 32 // bits
    words = F.pad(index, (0, -index.shape[-1] % in_word)).unflatten(-1, (-1, in_word))
    word = (words << torch.arange(in_word, device=index.device) * bits).sum(-1)
    return torch.where(word < 2**31, word, word - 2**32).to(torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`, what fills the last word included: int32 (..., W) -> int64 (..., W * (32 // bits)).

    >>> unpack_words(torch.tensor([[131073, 3]]), 16).tolist()
    [[1, 2, 3, 0]]
    """
    shifts = torch.arange(32 // bits, device=words.device) * bits
    return ((words.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
