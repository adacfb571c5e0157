"""The Triton kernels: right in the interpreter, compiled for GPUs that are not here, and out of the way without one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openwork import kernels
from openwork.kernels import registry
from openwork.kernels.cuda import triton as gpu

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("file", [each.name for each in sorted((HERE / "triton").glob("test_*.py"))])
def test_in_the_interpreter(file: str) -> None:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / "triton" / file),
    ]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False, env=variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


@needs_triton
def test_compiled_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "compile_kernels.py"), "80", "90", "100"]
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    variables["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False, env=variables)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert len(lines) == 3 * 15
    # The term must round like the reference, and whole groups of four be read in one instruction.
    assert all(made.endswith(" 0 fma") for name, made in lines.items() if " term" in name)
    assert all("v4.b32" in lines[f"sm_{capability} prune 2:4 float32"] for capability in (80, 90, 100))
    # Each lane has all keys of a strided group in its registers.
    assert all(" 0 shared" in made for name, made in lines.items() if "strided" in name and "32:64" not in name)
    # Code that grows with N takes long to compile: half a minute where everything is unrolled.
    assert all(int(made.split()[0]) < 100_000 for name, made in lines.items() if "32:64" in name)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(
    ("file", "kernel", "sizes"),
    [
        ("masks", "_one", {"lanes", "length", "inner"}),
        ("masks", "_many", {"tensors"}),
        ("bits", "_pack", {"tensors"}),
        ("bits", "_differ", {"tensors"}),
        ("skinny", "_gather", {"B", "groups", "share"}),
        ("skinny", "_expand", {"B", "groups", "share"}),
        ("skinny", "_finish", {"B", "count"}),
    ],
)
def test_a_kernel_is_compiled_once_for_all_sizes(file: str, kernel: str, sizes: set[str]) -> None:
    compiled = getattr(importlib.import_module(f"openwork.kernels.cuda.triton.{file}"), kernel)
    assert {each.name for each in compiled.params if each.do_not_specialize} == sizes


@pytest.mark.parametrize(
    "name",
    [
        "foreach_mask",
        "foreach_prune",
        "foreach_decay",
        "foreach_pack",
        "foreach_packed_sad",
        "foreach_transposable_mask",
        "skinny_gather_linear",
        "skinny_expand_linear",
    ],
)
def test_cuda_tensors_are_led_to_triton(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"openwork::{name}", "CUDA")


@needs_triton
@pytest.mark.parametrize("place", [place for (_, device), place in registry.KERNELS.items() if device == "CUDA"])
def test_the_kernels_that_they_are_led_to_exist(place: str) -> None:
    module, _, function = place.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_triton_kernels() -> None:
    assert not gpu.is_available()
    assert gpu.reason() in ("no CUDA GPU", "OPENWORK_TRITON=none")
    assert kernels.status("cuda") == f"no Triton kernels: {gpu.reason()}"


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As where there is a GPU, in a new process; what each first launch ends with, an exception's text or ""."""
    ends: list[str] = []

    def launched(*_: object) -> list[torch.Tensor]:
        end = ends.pop(0)
        if end:
            raise RuntimeError(end) if "memory" not in end else torch.cuda.OutOfMemoryError(end)
        return [torch.Tensor([[0.0, 0.0, 3.0, 4.0]])]

    monkeypatch.delenv("OPENWORK_TRITON", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "tensor", lambda data, device=None: torch.Tensor(data))
    monkeypatch.setitem(sys.modules, "openwork.kernels.cuda.triton.masks", SimpleNamespace(foreach_prune=launched))
    monkeypatch.setattr(gpu, "masks", SimpleNamespace(foreach_prune=launched), raising=False)
    gpu._lasting.cache_clear()
    yield ends
    gpu._lasting.cache_clear()


@needs_triton
@pytest.mark.parametrize(
    "end", ["CUDA out of memory. Tried to allocate 2 MiB", "operation not permitted when capturing"]
)
def test_a_failure_that_may_pass_is_not_kept(end: str, a_gpu: list[str]) -> None:
    a_gpu += [end, ""]
    assert end in gpu.reason()
    assert gpu.is_available()
    assert gpu.is_available()
    assert not a_gpu


@needs_triton
def test_a_failure_that_lasts_is_kept(a_gpu: list[str]) -> None:
    a_gpu += ["no C compiler", ""]
    assert "no C compiler" in gpu.reason()
    assert not gpu.is_available()
    assert a_gpu == [""]


@needs_triton
def test_nothing_is_tried_while_a_cuda_graph_is_captured(a_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not gpu.is_available()
    assert "captured" in gpu.reason()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    a_gpu += [""]
    assert gpu.is_available()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.is_available()
