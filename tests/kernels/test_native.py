"""The library itself: structs of one size on both sides, what `status` says, instruction sets by name, threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import openwork as ow
from openwork.kernels.cpu import native

STATUS = ow.kernels.status()
needs_library = pytest.mark.skipif(STATUS.isa is None, reason=str(STATUS))
LISTED = ", ".join(STATUS.available)


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@needs_library
def test_structs_have_one_size_in_c_and_in_python() -> None:
    lib = native.library()
    structs = (
        native.Groups,
        native.GemmWeight,
        native.GemmLinear,
        native.GemmConv2d,
        native.GemvCall,
        native.DotProductCall,
        native.Pixels,
        native.Compressed,
        native.Slots,
        native.Requantize,
    )
    assert [lib.openwork_size_of(i) for i in range(11)] == [*map(ctypes.sizeof, structs), 0]


@needs_library
def test_status_says_what_runs() -> None:
    assert str(STATUS) == f"native kernels: {STATUS.isa} (of {LISTED}), threads of torch"
    assert STATUS.isa in STATUS.available
    assert STATUS.available[-1] == "scalar"


def test_status_says_why_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native._open.cache_clear()
    try:
        monkeypatch.setattr(native, "_FILE", tmp_path / "libopenwork.so")
        assert str(ow.kernels.status()).startswith(
            "no native kernels: libopenwork.so was not built: it takes a C++17 compiler"
        )
        native._open.cache_clear()
        (tmp_path / "libopenwork.so").write_text("no library")
        assert "libopenwork.so does not load" in ow.kernels.status().reason
        with pytest.raises(RuntimeError, match=r"no native kernels: libopenwork\.so does not load"):
            ow.kernels.use_isa("scalar")
    finally:
        monkeypatch.undo()
        native._open.cache_clear()
        ow.kernels.status()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if STATUS.isa is None:
        pytest.skip(str(STATUS))
    native._open.cache_clear()
    try:
        expected = f"has interface {native._ABI}, needed 99: install again"
        monkeypatch.setattr(native, "_ABI", 99)
        assert expected in str(ow.kernels.status())
    finally:
        monkeypatch.undo()
        native._open.cache_clear()
        ow.kernels.status()


@needs_library
def test_instruction_sets_by_name(isa: str) -> None:
    assert ow.kernels.status().isa == isa == ow.kernels.use_isa(isa)
    assert ow.kernels.use_isa(None) == STATUS.available[0]
    for wrong in ("", "avx", "AVX2", "neon9"):
        if wrong:
            with pytest.raises(ValueError, match=f"instruction set '{wrong}'; this machine and build have {LISTED}"):
                ow.kernels.use_isa(wrong)
    assert ow.kernels.status().isa == STATUS.available[0]


SAYS = "import openwork as ow; print(ow.kernels.status())"


@needs_library
@pytest.mark.parametrize("name", STATUS.available)
def test_the_variable_chooses(name: str) -> None:
    done = python(SAYS, OPENWORK_ISA=name)
    assert done.stdout.strip() == f"native kernels: {name} (of {LISTED}), threads of torch", done.stderr


def test_the_variable_switches_off() -> None:
    work = "import torch; w = torch.ops.openwork.foreach_prune([torch.tensor([[1., 2.]])], 1, 2, [1, 1, 0])"
    done = python(f"{SAYS}; {work}; print(w[0].tolist())", OPENWORK_ISA="none")
    assert done.stdout.splitlines() == ["no native kernels: OPENWORK_ISA=none", "[[0.0, 2.0]]"], done.stderr


@needs_library
def test_a_wrong_variable_is_an_error() -> None:
    done = python(SAYS, OPENWORK_ISA="avx1024")
    assert done.returncode != 0
    assert f"OPENWORK_ISA=avx1024; this machine and build have none, {LISTED}" in done.stderr


BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_of_torch(threads: int) -> None:
    """What the library was handed runs on as many threads as torch was told to use."""
    run = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p)
    pool = native._thread_pool()
    assert pool is not None
    seen: list[tuple[int, int, int]] = []

    @BODY
    def body(first: int, last: int, _: object) -> None:
        seen.append((first, last, threading.get_native_id()))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(pool)(0, 100, 1, body, None)
    finally:
        torch.set_num_threads(before)
    assert len({thread for _, _, thread in seen}) == threads
    assert sorted(i for first, last, _ in seen for i in range(first, last)) == list(range(100))


def test_deploying_without_the_library_warns_once() -> None:
    script = """
import warnings, torch, openwork as ow
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ow.plan(torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)), torch.zeros(1, 8), pattern="8:8")
print(*(each.message for each in caught))
"""
    done = python(script, OPENWORK_ISA="none")
    text = "everything works without the native kernels, slower (no native kernels: OPENWORK_ISA=none)"
    assert text in done.stdout, done.stderr
    assert done.stdout.count("slower") == 1
