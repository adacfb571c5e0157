"""The operator `slots` on a CPU: one pass over the weight."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openwork.kernels.cpu import native
from openwork.kernels.cpu.native import Slots, address, done
from openwork.ops.slots import slots_reference, stored_of

_COUNTED = {torch.float32: 0x7FFF_FFFF, torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.int16: 0xFFFF}


def slots(weight: Tensor, n: int, m: int, tile: int, step: int, even: bool) -> tuple[Tensor, Tensor]:
    isa = native.isa()
    fits = weight.ndim == 2 and weight.numel() and 1 <= n <= m <= 64 and tile >= m and tile % m == 0
    if isa is None or weight.dtype not in _COUNTED or not fits:
        return slots_reference(weight, n, m, tile, step, even)
    (O, K), weight = weight.shape, weight.contiguous()
    total = O * sum(stored_of(K, n, m, tile, even))
    values, offsets = weight.new_empty(total), torch.empty(total + 1, dtype=torch.int16)
    offsets[-1] = 0
    crowded = ctypes.c_int64()
    places = (address(weight), address(values), address(offsets))
    call = Slots(*places, O, K, tile, _COUNTED[weight.dtype], n, m, weight.itemsize, step, even)
    done(isa.lib.openwork_slots(isa.kernels, ctypes.byref(call), ctypes.byref(crowded)))
    return slots_reference(weight, n, m, tile, step, even) if crowded.value else (values, offsets)  # that says which
