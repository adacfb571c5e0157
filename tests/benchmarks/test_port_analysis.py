"""The loops that the port analysis takes out of a disassembly, and what it makes of their bounds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import port_analysis
from port_analysis import Bound, Loop, dense, innermost, ours, table

TEXT = """\
0000000000001000 <void gemm_of<8, float>(GemmTile)>:
    1000:\tmov    %rax,%rbx
    1004:\txor    %ecx,%ecx
    1006:\tvbroadcastss (%r8,%rdi,2),%zmm0
    100d:\tvfmadd231ps (%rsi),%zmm0,%zmm8
    1013:\tvfmadd231ps 0x40(%rsi),%zmm0,%zmm7
    101a:\tcmp    %r9,%rdi
    101d:\tjne    1006 <void gemm_of<8, float>(GemmTile)+0x6>
    101f:\tvmovups %zmm8,(%rax)
    1025:\tjne    1004 <void gemm_of<8, float>(GemmTile)+0x4>
    102b:\tret

0000000000002000 <void gemm_of<4, float>(GemmTile)>:
    2006:\tvbroadcastss (%r8,%rdi,2),%zmm0
    200d:\tvfmadd231ps (%rsi),%zmm0,%zmm8
    201d:\tjne    2006 <void gemm_of<4, float>(GemmTile)+0x6>
"""


def test_the_innermost_loop_is_taken():
    (loop,) = innermost(TEXT, "gemm_of<8, float>", ["vfmadd231ps"])
    assert loop == (
        "vbroadcastss (%r8,%rdi,2),%zmm0",
        "vfmadd231ps (%rsi),%zmm0,%zmm8",
        "vfmadd231ps 0x40(%rsi),%zmm0,%zmm7",
        "cmp %r9,%rdi",
        "jne .Lstart",
    )
    assert list(innermost(TEXT, "gemm_of<8, float>", ["vpdpbusd"])) == []
    assert [(each.name, each.macs) for each in ours(TEXT)] == [("float32, GEMM", 32)]


def test_a_dense_loop_is_blocked():
    loop = dense("vpdpbusd", rows=9, vectors=3)
    assert loop.macs == 9 * 3 * 64
    assert sum("(%rax)" in line for line in loop.code) == 3
    assert sum("(%rbx)" in line for line in loop.code) == 9
    sums = {line.rpartition(" ")[2] for line in loop.code if line.startswith("vpdpbusd")}
    assert len(sums) == 27


def test_the_most_that_sparse_can_gain(monkeypatch):
    mine = Loop("float32, GEMM", "vfmadd231ps", ("vfmadd231ps (%rsi), %zmm0, %zmm1",) * 8)
    twin = dense("vfmadd231ps", rows=9, vectors=3)
    cycles = {mine.name: Bound(5.0, "Port2", 1.0, ""), twin.name: Bound(13.5, "Port5", 0.996, "")}
    monkeypatch.setattr(port_analysis, "bound", lambda loop, cpu, tool: cycles[loop.name])
    line = table([mine, twin], "any", "any").splitlines()[-1]
    assert line == "| float32, GEMM | 26 | Port2 (100%) | 32 | Port5 (100%) | 1.60 | 3.20 | 6.40 | 12.80 |"


def test_the_tool_itself():
    try:
        tool = port_analysis._tool()
    except SystemExit:
        pytest.skip("llvm-mca is not installed")
    found = port_analysis.bound(dense("vfmadd231ps", rows=9, vectors=3), port_analysis.CPU, tool)
    assert 13.5 <= found.cycles < 14  # two multiply-adds a cycle, and nothing else in the way
    assert found.share > 0.95
