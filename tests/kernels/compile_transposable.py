"""Compile the Triton kernel of transposable masks for GPUs that are not here: python compile_transposable.py 80 90 100.

Prints a line for each GPU and dtype: bytes of code, registers, spilled registers.
"""

import subprocess
import sys
import tempfile

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from openwork.kernels.triton.transposable import _TILES, _keep

NUMBERS = ("tiles", "tiles_in", "tiles_out", "outer_step", "out_step", "in_step", "inner")


def compiled(capability: int, dtype: str):
    types = {"score": f"*{dtype}", "keep": "*u8"} | dict.fromkeys(NUMBERS, "i32") | {"B": "constexpr"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 1)}
    source = ASTSource(_keep, types, {"B": _TILES}, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32))


def resources(code: bytes) -> str:
    """What cuobjdump says of the registers, where the wheel of triton has it."""
    tool = getattr(getattr(knobs.nvidia, "cuobjdump", None), "path", None)
    if not tool:
        return "no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return " ".join(word for line in text.splitlines() for word in line.split() if word.startswith(("REG:", "STACK:")))


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for dtype in ("fp32", "bf16", "fp16"):
            kernel = compiled(capability, dtype)
            code = kernel.asm["cubin"]
            print(f"sm_{capability} {dtype}: {len(code)} bytes, {resources(code)}", flush=True)
