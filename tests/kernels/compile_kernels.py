"""Compile the Triton kernels to machine code for GPUs that are not here: python compile_kernels.py 80 90 100.

Prints a line for each kernel and GPU: bytes of code, how wide global loads are, bytes of shared memory, and fused
multiply-adds.
"""

from __future__ import annotations

import re
import sys

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from openwork.kernels.cuda.triton import bits, masks, skinny, transposable
from openwork.kernels.cuda.triton.floats import KINDS, WORDS
from openwork.layouts.skinny import skinny_index_bits
from openwork.nm.pattern import Pattern

UNFUSED = {"num_warps": 4, "enable_fp_fusion": False}


def mask_kernel(task: int, dtype: torch.dtype, n: int, m: int, how: int) -> tuple:
    """`_one` for a weight; addresses are multiples of 16, as torch's are."""
    word = "*i32" if dtype == torch.float32 else "*i16"
    out = "*u8" if task == masks.KEEP else word
    padded, at_once = masks._sizes(m, how)
    fixed = {"N": n, "M": m, "MP": padded, "P": at_once, "HOW": how, "UNROLLED": masks._UNROLLED, "TASK": task}
    fixed |= {"INFINITY": masks._INFINITY[dtype], "KIND": KINDS[dtype]}
    types = {"weight": word, "out": out, "lanes": "i32", "length": "i32", "inner": "i32", "rate": "fp32"}
    return masks._one, types, fixed, ("weight", "out"), UNFUSED


def list_kernel(task: int, dtype: torch.dtype, n: int, m: int, how: int) -> tuple:
    _, _, fixed, _, _ = mask_kernel(task, dtype, n, m, how)
    word = WORDS[dtype]
    fixed |= {"BITS": word, "OUT": tl.uint8 if task == masks.KEEP else word}
    return masks._many, {"rows": "*i64", "tensors": "i32", "rate": "fp32"}, fixed, ("rows",), UNFUSED


KERNELS = {
    "prune 2:4 float32": mask_kernel(masks.PRUNE, torch.float32, 2, 4, masks.WHOLE),
    "term 2:4 bfloat16": mask_kernel(masks.DECAY, torch.bfloat16, 2, 4, masks.WHOLE),
    "prune 4:16 float32, strided": mask_kernel(masks.PRUNE, torch.float32, 4, 16, masks.STRIDED),
    "term 32:64 float32, strided": mask_kernel(masks.DECAY, torch.float32, 32, 64, masks.STRIDED),
    "mask 3:20 float16, strided": mask_kernel(masks.KEEP, torch.float16, 3, 20, masks.STRIDED),
    "terms of a list 2:4 float32": list_kernel(masks.DECAY, torch.float32, 2, 4, masks.WHOLE),
    "pack": (bits._pack, {"rows": "*i64", "tensors": "i32"}, {"B": 1024}, ("rows",), {}),
    "differ": (bits._differ, {"rows": "*i64", "tensors": "i32", "counts": "*i64"}, {"B": 1024}, ("rows",), {}),
}


def skinny_kernel(name: str, dtype: torch.dtype, n: int, m: int, rows: int) -> tuple:
    function, expand = getattr(skinny, name), name == "_expand"
    BO, BG = skinny.tile(n, m, rows, expand)
    types = dict.fromkeys(("x", "values"), "*i16") | {"indices": "*i32", "parts": "*fp32"}
    types |= dict.fromkeys(("B", "K", "OP", "groups", "share"), "i32")
    fixed = {"N": n, "M": m, "BITS": skinny_index_bits(Pattern(n, m)), "KIND": KINDS[dtype], "BG": BG, "BO": BO}
    fixed |= {"MP": 1 << (m - 1).bit_length()} if expand else {"BP": 1 << (rows - 1).bit_length()}
    return function, types, fixed, ("x", "values", "indices", "parts", "K", "OP"), {"num_warps": 4}


TILES = {"score": "*bf16", "keep": "*u8"} | dict.fromkeys(("tiles", "tiles_in", "tiles_out"), "i32")
TILES |= dict.fromkeys(("outer_step", "out_step", "in_step", "inner"), "i32")
FINISH = {"parts": "*fp32", "bias": "*i16", "y": "*i16"} | dict.fromkeys(("B", "O", "OP", "count"), "i32")

KERNELS |= {
    "gather 2:4 bfloat16, 1 row": skinny_kernel("_gather", torch.bfloat16, 2, 4, 1),
    "gather 1:16 float16, 16 rows": skinny_kernel("_gather", torch.float16, 1, 16, 16),
    "gather 32:64 bfloat16, 1 row": skinny_kernel("_gather", torch.bfloat16, 32, 64, 1),
    "expand 32:64 bfloat16": skinny_kernel("_expand", torch.bfloat16, 32, 64, 16),
    "expand 2:4 bfloat16": skinny_kernel("_expand", torch.bfloat16, 2, 4, 16),
    "finish": (
        skinny._finish, FINISH, {"BIAS": True, "RELU": True, "KIND": KINDS[torch.bfloat16], "BO": 256}, ("parts",), {},
    ),
    "transposable bfloat16": (
        transposable._keep, TILES, {"B": transposable._TILES}, ("score", "keep"), {"num_warps": 4},
    ),
}  # fmt: skip


def compiled(kernel: tuple, capability: int):
    function, types, fixed, aligned, options = kernel
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for name, kernel in KERNELS.items():
            made = compiled(kernel, capability)
            ptx = made.asm["ptx"]
            wide = sorted(set(re.findall(r"ld\.global[a-zA-Z0-9_:.]*?\.(v\d\.b\d+|b\d+)", ptx)))
            fused = len(re.findall(r"\bfma\.", ptx))
            print(
                f"sm_{capability} {name}: {len(made.asm['cubin'])} bytes, loads {' '.join(wide)}, "
                f"{made.metadata.shared} shared, {fused} fma"
            )


if __name__ == "__main__":
    main()
