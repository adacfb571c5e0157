"""The C++ code by itself, the way `make sanitize`, `make neon` and `make avx512` run it, and the installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
    assert set(found) == {"avx512bf16", "avx512vbmi", "avx512vnni", "avx512", "scalar"}
    assert min(found.values()) > 1000


# --- installation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what an installation reads."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools", minversion="77")
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "*.egg-info", "runs", "docs", "tests", "benchmarks", "__pycache__"
    )
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    return tmp_path / "source"


def pip_wheel(source: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel beside the source, without the network; with the compiler that `environment` names, if any."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", *flags]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "OPENWORK_NO_NATIVE")}
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(source.parent), "."],
        capture_output=True,
        text=True,
        env=inherited | environment,
        cwd=source,
        timeout=1800,
        check=False,
    )


def wheel(source: Path, **environment: str) -> tuple[Path, str]:
    """A wheel and what was printed."""
    done = pip_wheel(source, "-v", **environment)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    (path,) = source.parent.glob("*.whl")
    return path, printed


def test_a_compiler_that_fails_is_an_error_with_its_message(source: Path) -> None:
    if lacking := missing("g++"):
        pytest.skip(f"needs {lacking}")
    for file in (source / "csrc").glob("*.cpp"):
        file.write_text('#error "this compiler is too old"\n' if file.name == "scalar.cpp" else "")
    done = pip_wheel(source, CC="gcc", CXX="g++")
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "this compiler is too old" in printed
    assert "OPENWORK_NO_NATIVE=1 installs without" in printed
    assert not list(source.parent.glob("*.whl"))


def test_a_compiler_that_was_named_has_to_work(source: Path) -> None:
    done = pip_wheel(source, CC="false", CXX="false")
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(r"error: .*false.*: the native library was not built", printed)
    assert "OPENWORK_NO_NATIVE=1 installs without" in printed


PYTHONS_CXX = str(sysconfig.get_config_var("CXX")).partition(" ")[0]
WARNING = "warning: openwork is installed without its native library; everything works, slower: "


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/no/such/folder"}, "there is no C++ compiler here"),
        ({"PATH": "/no/such/folder", "CXX": ""}, f"there is no C++ compiler here ({PYTHONS_CXX})"),
        ({"OPENWORK_NO_NATIVE": "1", "CXX": "false"}, ""),
    ],
)
def test_without_a_compiler_the_installation_says_last_that_it_is_slower(
    source: Path, environment: dict[str, str], reason: str
) -> None:
    path, printed = wheel(source, **environment)
    assert printed.count(WARNING + reason) == 1
    built = printed[: printed.index(WARNING)]
    assert "creating wheel" in built or "adding 'openwork" in built
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(source.parent / "installed")
    assert not [name for name in names if name.endswith(".so")]
    script = (
        "import torch, openwork as ow; print(ow.__file__); print(ow.kernels.status());"
        "print(torch.ops.openwork.foreach_prune([torch.tensor([[1., 2.]])], 1, 2, [1, 1, 0])[0].tolist())"
    )
    installed = {**os.environ, "PYTHONPATH": str(source.parent / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=installed, cwd=source.parent, check=False
    )
    where, status, pruned = done.stdout.splitlines()
    assert where.startswith(str(source.parent)), done.stderr
    assert status.startswith("no native kernels: libopenwork.so was not built: it takes a C++17 compiler")
    assert pruned == "[[0.0, 2.0]]"


@pytest.mark.slow
def test_a_compiler_without_bfloat16_builds_the_other_kernels(source: Path, tmp_path: Path) -> None:
    if lacking := missing("g++", "bash"):
        pytest.skip(f"needs {lacking}")
    old = tmp_path / "g++"
    old.write_text(
        '#!/bin/bash\n[[ "$*" == *-mavx512bf16* ]] && { echo "unrecognized option" >&2; exit 1; }\n'
        'exec g++ "${@/-O3/-O0}"\n'
    )
    old.chmod(0o755)
    path, printed = wheel(source, CC=str(old), CXX=str(old))
    if "x86_64" not in path.name:
        pytest.skip("needs x86-64")
    assert "warning: this compiler knows no AVX-512 BF16: its kernels are left out" in printed
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "installed")
    script = "import openwork as ow; print(','.join(ow.kernels.status().available))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert "avx512bf16" not in done.stdout
    assert done.stdout.strip().endswith("scalar"), done.stderr


@pytest.mark.slow
def test_a_wheel_serves_every_python(source: Path, tmp_path: Path) -> None:
    if lacking := missing("g++", "bash"):
        pytest.skip(f"needs {lacking}")
    quick = tmp_path / "g++"  # how fast the code is does not matter here
    quick.write_text('#!/bin/bash\nexec g++ "${@/-O3/-O0}"\n')
    quick.chmod(0o755)
    path, _ = wheel(source, CC=str(quick), CXX=str(quick))
    assert "-py3-none-" in path.name
    assert not path.name.endswith("-any.whl")
    with zipfile.ZipFile(path) as archive:
        libraries = [f"openwork/kernels/cpu/libopenwork{suffix}.so" for suffix in ("", "_ort")]
        assert sorted(name for name in archive.namelist() if name.endswith(".so")) == libraries
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".inl", ".h"))]
