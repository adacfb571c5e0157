"""Builds the wheel and the source archive, installs each in an environment that has torch, numpy and safetensors alone,
with a compiler and without, and uses it: `make package`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "install"


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run(sys.executable, "-m", "venv", "env")
    python = WORK / "env/bin/python"
    torch = [f"--index-url={index}"] if (index := os.environ.get("TORCH_INDEX")) else []
    pip(python, "install", "-c", ROOT / "constraints.txt", *torch, "torch")
    pip(python, "install", "-c", ROOT / "constraints.txt", "numpy", "safetensors")
    archives = build(python)
    (WORK / "no-compiler").mkdir()
    without = {"PATH": str(WORK / "no-compiler"), "CXX": ""}
    for archive, environment, kernels in (
        (archives[".whl"], {}, "native"),
        (archives[".whl"], without, "native"),  # it needs no compiler any more
        (archives[".gz"], {}, "native"),
        (archives[".gz"], without, "slow"),
        (archives[".gz"], {"OPENWORK_NO_NATIVE": "1"}, "slow"),
    ):
        pip(python, "install", "--force-reinstall", "--no-deps", "--no-cache-dir", archive, **environment)
        pip(python, "check")
        run(python, ROOT / "tests/install/smoke.py", kernels, OMP_NUM_THREADS="1")
        print(f"passed: {archive.name}, {environment or 'with a compiler'}", flush=True)


def build(python: Path) -> dict[str, Path]:
    """The wheel and the source archive, by suffix, from a copy of what git tracks."""
    source = WORK / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    pip(python, "install", "build")
    run(python, "-m", "build", "--outdir", WORK, source)  # the wheel from the source archive
    return {path.suffix: path for path in WORK.glob("openwork-*") if path.is_file()}


def pip(python: Path, *words: object, **environment: str) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "--quiet", *words, **environment)


def run(*words: object, **environment: str) -> None:
    """Runs a command in the folder that holds nothing of the source."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    subprocess.run([str(word) for word in words], env=inherited | environment, cwd=WORK, check=True)


if __name__ == "__main__":
    main()
