"""The C++ code by itself, the way `make sanitize`, `make neon` and `make avx512` run it, and the installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import openwork

ROOT = Path(openwork.__file__).resolve().parent.parent
CPUINFO = Path("/proc/cpuinfo")


def missing(*needed: str) -> str:
    """The first of some commands and files that is not there."""
    return next((each for each in needed if not shutil.which(each) and not Path(each).exists()), "")


def cases(target: str, *needed: str) -> dict[str, int]:
    """Instruction set -> how many cases passed."""
    if not (ROOT / "csrc" / "tests").exists():
        pytest.skip("needs the source tree")
    if lacking := missing("make", *needed):
        pytest.skip(f"needs {lacking}")
    command = ["make", "--no-print-directory", "-C", str(ROOT / "csrc" / "tests"), target]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "SECONDS")
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {words[0]: int(words[1]) for line in done.stdout.splitlines() if (words := line.split())[2:] == ["cases"]}


@pytest.mark.slow
def test_kernels_under_sanitizers() -> None:
    found = cases("sanitize", os.environ.get("CXX", "g++"))
    has_avx2 = CPUINFO.exists() and " avx2 " in CPUINFO.read_text()
    assert set(found) >= ({"avx2", "scalar"} if has_avx2 else {"scalar"})
    assert min(found.values()) > 1000


@pytest.mark.slow
def test_kernels_as_arm_code() -> None:
    assert min(cases("neon", "aarch64-linux-gnu-g++", "qemu-aarch64").values()) > 1000


@pytest.mark.slow
def test_avx512_kernels_in_plain_c() -> None:
    found = cases("avx512", os.environ.get("CXX", "g++"), "/usr/include/simde/x86/avx512.h")
    assert set(found) == {"avx512bf16", "avx512vnni", "avx512", "scalar"}
    assert min(found.values()) > 1000


# --- installation ----------------------------------------------------------------------------------------------------


def wheel(folder: Path, compiler: str) -> tuple[Path, str]:
    """The wheel that a compiler makes of the source tree, and what was printed; without the network."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools", minversion="77")
    source = folder / "source"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "*.egg-info", "runs", "docs", "tests", "benchmarks", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        ".",
    ]
    environment = {**os.environ, "CC": compiler, "CXX": compiler}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=source, timeout=1800, check=False
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    (made,) = folder.glob("*.whl")
    return made, printed


def test_without_a_compiler_the_package_is_installed_and_says_why_it_is_slower(tmp_path: Path) -> None:
    made, printed = wheel(tmp_path, "false")
    assert "warning: the native library was not built, openwork will run without it" in printed
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert not [name for name in names if name.endswith(".so")]
    script = (
        "import torch, openwork as ow; print(ow.__file__); print(ow.kernels.status());"
        "print(torch.ops.openwork.prune(torch.tensor([[1., 2.]]), 1, 2, 1, 1, False).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    where, status, pruned = done.stdout.splitlines()
    assert where.startswith(str(tmp_path)), done.stderr
    assert status.startswith("no native kernels: libopenwork.so was not built: it takes a C++17 compiler")
    assert pruned == "[[0.0, 2.0]]"


@pytest.mark.slow
def test_a_compiler_without_bfloat16_builds_the_other_kernels(tmp_path: Path) -> None:
    if lacking := missing("g++", "bash"):
        pytest.skip(f"needs {lacking}")
    old = tmp_path / "g++"
    old.write_text(
        '#!/bin/bash\n[[ "$*" == *-mavx512bf16* ]] && { echo "unrecognized option" >&2; exit 1; }\n'
        'exec g++ "${@/-O3/-O0}"\n'
    )
    old.chmod(0o755)
    made, printed = wheel(tmp_path, str(old))
    if "x86_64" not in made.name:
        pytest.skip("needs x86-64")
    assert "warning: this compiler knows no AVX-512 BF16: its kernels are left out" in printed
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "installed")
    script = "import openwork as ow; print(','.join(ow.kernels.status().available))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert "avx512bf16" not in done.stdout
    assert done.stdout.strip().endswith("scalar"), done.stderr


@pytest.mark.slow
def test_a_wheel_serves_every_python(tmp_path: Path) -> None:
    if lacking := missing("g++", "bash"):
        pytest.skip(f"needs {lacking}")
    quick = tmp_path / "g++"  # how fast the code is does not matter here
    quick.write_text('#!/bin/bash\nexec g++ "${@/-O3/-O0}"\n')
    quick.chmod(0o755)
    made, _ = wheel(tmp_path, str(quick))
    assert "-py3-none-" in made.name
    assert not made.name.endswith("-any.whl")
    with zipfile.ZipFile(made) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == ["openwork/kernels/cpu/libopenwork.so"]
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".inl", ".h"))]
