"""Bounds of the kernels' inner loops on a processor: what llvm-mca says of the machine code in the built library.

    python benchmarks/port_analysis.py                # a table; needs objdump and llvm-mca
    python benchmarks/port_analysis.py --measure      # what the loads of such loops cost here; needs gcc and AVX-512
    python benchmarks/port_analysis.py --write        # both into docs/performance-details.md, between its two lines
    python benchmarks/port_analysis.py --listing      # the loops themselves, each instruction with its ports

A loop of ours is the innermost one of its function with the most products, as objdump shows it. A dense loop is written
here, blocked as oneDNN's: sums in registers, each weight vector loaded once for all rows, the input of a row broadcast
from memory once for all its products. llvm-mca knows ports, decoding and latencies; caches, line crossings, clock and
misprediction it does not, and every load hits the first-level cache. So a bound is what forbids, not what is reached.

Ice Lake Xeons have the ports of Skylake's for what these loops do, and are taken as such: LLVM's own model of them (19)
lets 512-bit multiply-adds run on one port, where this machine runs two a cycle. `--cpu znver4` needs LLVM 16; its model
gives half of the bfloat16 products a cycle that our kernel was measured to do on Zen 4, so it is not in the page.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_tables import between

import openwork

LIBRARY = Path(openwork.__file__).parent / "kernels" / "cpu" / "libopenwork.so"
PAGE = Path(__file__).parents[1] / "docs" / "performance-details.md"
START = "<!-- port analysis -->\n"
CPU = "skylake-avx512"
MACS = {"vfmadd231ps": 16, "vdpbf16ps": 32, "vpdpbusd": 64}
"""Multiply-adds of an instruction on 64 bytes."""
PATTERNS = {"2:4": 1 / 2, "1:4": 1 / 4, "1:8": 1 / 8, "1:16": 1 / 16}


@dataclass(frozen=True)
class Loop:
    """One inner loop: which product it is made of, its instructions (AT&T syntax), and whether it is a dense one."""

    name: str
    product: str
    code: tuple[str, ...]
    dense: bool = False

    @property
    def macs(self) -> int:
        return MACS[self.product] * sum(line.startswith(self.product) for line in self.code)


@dataclass(frozen=True)
class Bound:
    """Cycles of an iteration, in the long run, and how much of them the busiest port is used: by name, of one."""

    cycles: float
    port: str
    share: float
    listing: str


def innermost(disassembly: str, function: str, needs: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Loops without another in them, of all functions whose name contains `function`, that have all of `needs`."""
    for block in disassembly.split("\n\n"):
        head, _, body = block.partition("\n")
        if function not in head or not all(each in body for each in needs):
            continue
        found = re.findall(r"^ *([0-9a-f]+):\t(\S+) *([^#<\n]*)", body, flags=re.M)
        at = {address: i for i, (address, _, _) in enumerate(found)}
        backward = [
            (at[target.strip()], i)
            for i, (_, code, target) in enumerate(found)
            if code.startswith("j") and at.get(target.strip(), i) < i
        ]
        for first, last in backward:
            if any((a, b) != (first, last) and first <= a and b <= last for a, b in backward):
                continue
            lines = tuple(f"{code} {operands.strip()}".strip() for _, code, operands in found[first:last])
            if all(any(line.startswith(each) for line in lines) for each in needs):
                yield (*lines, f"{found[last][1]} .Lstart")


def ours(disassembly: str) -> list[Loop]:
    """The loops of many rows: float32 by GEMM, bfloat16 and int8 by dot products."""
    wanted = {
        "float32, GEMM": ("gemm_of<8, float>", ["vfmadd231ps", "vbroadcastss"]),
        "bfloat16, dot product": ("Pairs", ["vdpbf16ps", "vpermw"]),
        "int8, dot product": ("Quads", ["vpdpbusd", "vpermb"]),
    }
    loops = []
    for name, (function, needs) in wanted.items():
        found = [each for each in innermost(disassembly, function, needs) if any("zmm" in line for line in each)]
        if found:
            most = max(found, key=lambda lines: (sum(line.startswith(needs[0]) for line in lines), -len(lines)))
            loops.append(Loop(name, needs[0], most))
    return loops


def dense(product: str, rows: int, vectors: int) -> Loop:
    """Sums of `rows` x `vectors` registers; for each step of K `vectors` vectors of weights are loaded, and the inputs
    of each row are broadcast, into a register that all of its products share."""
    broadcast = "vbroadcastss" if product == "vfmadd231ps" else "vpbroadcastd"
    weights = [f"vmovups {64 * v}(%rax), %zmm{rows * vectors + v}" for v in range(vectors)]
    code = [*weights]
    for row in range(rows):
        code.append(f"{broadcast} {4 * row}(%rbx), %zmm31")
        code += [f"{product} %zmm{rows * vectors + v}, %zmm31, %zmm{row * vectors + v}" for v in range(vectors)]
    code += [f"addq ${64 * vectors}, %rax", f"addq ${4 * rows}, %rbx", "decq %rcx", "jne .Lstart"]
    names = {"vfmadd231ps": "float32", "vdpbf16ps": "bfloat16", "vpdpbusd": "int8"}
    return Loop(f"{names[product]}, dense", product, tuple(code), dense=True)


def bound(loop: Loop, cpu: str, tool: str) -> Bound:
    """What llvm-mca says of the loop, a thousand times."""
    source = ".Lstart:\n" + "\n".join(loop.code) + "\n"
    call = [tool, "-mtriple=x86_64-linux-gnu", f"-mcpu={cpu}", "-iterations=1000", "-"]
    made = subprocess.run([*call, "--json"], input=source, capture_output=True, text=True, check=True)
    listing = subprocess.run(call, input=source, capture_output=True, text=True, check=True).stdout
    region: dict[str, Any] = json.loads(made.stdout)
    names = region["TargetInfo"]["Resources"]
    views = region["CodeRegions"][0]
    cycles = views["SummaryView"]["TotalCycles"] / views["SummaryView"]["Iterations"]
    used: dict[int, float] = {}
    for each in views["ResourcePressureView"]["ResourcePressureInfo"]:
        if each["InstructionIndex"] == len(loop.code):  # the line of totals
            used[each["ResourceIndex"]] = each["ResourceUsage"]
    busiest = max(used, key=lambda i: used[i])
    return Bound(cycles, names[busiest], used[busiest] / cycles, listing)


def table(loops: Sequence[Loop], cpu: str, tool: str) -> str:
    """A line for each loop of ours: what bounds it, its dense version, and the most that sparse can be faster."""
    bounds = {loop.name: bound(loop, cpu, tool) for loop in loops}
    rates = {loop.name: loop.macs / bounds[loop.name].cycles for loop in loops}
    heads = ["kernel", "multiply-adds a cycle", "busiest port", "dense", "busiest port", *PATTERNS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for loop in (each for each in loops if not each.dense):
        twin = next(each for each in loops if each.dense and each.product == loop.product)
        ratio = rates[loop.name] / rates[twin.name]
        cells = [loop.name, f"{rates[loop.name]:.0f}", _port(bounds[loop.name])]
        cells += [f"{rates[twin.name]:.0f}", _port(bounds[twin.name])]
        lines.append("| " + " | ".join([*cells, *(f"{ratio / share:.2f}" for share in PATTERNS.values())]) + " |")
    return "\n".join(lines)


def _port(found: Bound) -> str:
    return f"{found.port} ({found.share:.0%})"


LOOPS = {
    "multiply-adds of registers": [f"vfmadd231ps %zmm30, %zmm31, %zmm{i}" for i in range(16)],
    "multiply-adds, one operand in memory": [f"vfmadd231ps {64 * i}(%rsi), %zmm31, %zmm{i}" for i in range(16)],
    "loads of 64 bytes": [f"vmovups {64 * i}(%rsi), %zmm{i}" for i in range(16)],
    "loads of 4 bytes for all lanes": [f"vbroadcastss {4 * i}(%rsi), %zmm{i}" for i in range(16)],
    "multiply-adds, half of them with an operand in memory": [
        f"vfmadd231ps {f'{64 * i}(%rsi)' if i % 2 else '%zmm30'}, %zmm31, %zmm{i}" for i in range(16)
    ],
    "int8: products of registers": [f"vpdpbusd %zmm30, %zmm31, %zmm{i}" for i in range(16)],
    "int8: permutations and products, eight of each": [
        line
        for i in range(8)
        for line in (f"vpermb %zmm31, %zmm30, %zmm{16 + i}", f"vpdpbusd %zmm31, %zmm{16 + i}, %zmm{i}")
    ],
}
"""Sixteen instructions each."""


def measured(rounds: int = 300, times: int = 20_000) -> dict[str, float]:
    """Cycles of each loop here, one being what two multiply-adds of registers take: the least of many short rounds in
    turns. Memory is 1 KiB at fixed addresses, in the first-level cache."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "loops.s", Path(folder) / "loops.so"
        bodies = ["\n".join(lines) for lines in LOOPS.values()]
        zeros = "\n".join(
            f"vpxord %zmm{i}, %zmm{i}, %zmm{i}" for i in range(32)
        )  # what is left there may be slow numbers
        source.write_text(
            "\n".join(
                f".globl f{i}\nf{i}:\n{zeros}\n.p2align 5\n1:\n{body}\ndec %rdi\njne 1b\nvzeroupper\nret"
                for i, body in enumerate(bodies)
            )
            + "\n"
        )
        subprocess.run(["gcc", "-shared", "-nostdlib", "-o", str(made), str(source)], check=True)
        library = ctypes.CDLL(str(made))
        memory = ctypes.create_string_buffer(4096)
        at = ctypes.c_void_p((ctypes.addressof(memory) + 63) // 64 * 64)
        best = dict.fromkeys(LOOPS, float("inf"))
        for _ in range(rounds):
            for i, name in enumerate(LOOPS):
                start = time.perf_counter()
                getattr(library, f"f{i}")(ctypes.c_long(times), at)
                best[name] = min(best[name], time.perf_counter() - start)
    cycle = next(iter(best.values())) / 8
    return {name: seconds / cycle for name, seconds in best.items()}


def _measured_table() -> str:
    lines = ["| sixteen of | cycles |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {cycles:.1f} |" for name, cycles in measured().items())])


def _tool() -> str:
    for name in (*(f"llvm-mca-{version}" for version in range(30, 13, -1)), "llvm-mca"):
        if shutil.which(name):
            return name
    raise SystemExit("llvm-mca is missing: apt-get install llvm")


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--cpu", default=CPU, help="whose ports, as llvm-mca calls it")
    parser.add_argument("--measure", action="store_true", help="what loads cost on this machine")
    parser.add_argument("--write", action="store_true", help="into docs/performance-details.md")
    parser.add_argument("--listing", action="store_true", help="the loops, with the ports of each instruction")
    args = parser.parse_args()
    call = ["objdump", "-d", "--no-show-raw-insn", "-C", str(args.library)]
    mine = ours(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    mine = [each for each in mine if args.cpu != CPU or each.product != "vdpbf16ps"]  # it has no such instruction
    loops = [*mine, *(dense(each.product, rows=9, vectors=3) for each in mine)]
    texts = [table(loops, args.cpu, _tool())]
    texts += [f"{each.name}\n{bound(each, args.cpu, _tool()).listing}" for each in loops if args.listing]
    texts += [_measured_table()] if args.measure or args.write else []
    if args.write:
        PAGE.write_text(between(PAGE.read_text(), START, "\n" + "\n\n".join(texts) + "\n\n", PAGE))
    else:
        print("\n\n".join(texts))


if __name__ == "__main__":
    main()
