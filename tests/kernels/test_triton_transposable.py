"""The Triton kernel of transposable masks: right in the interpreter, and machine code for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def output_of(*words, **variables):
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "PYTEST_ADDOPTS": "", **variables},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_in_the_interpreter():
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "interpret_transposable.py"))
    assert " passed" in output_of(*words, TRITON_INTERPRET="1").splitlines()[-1]


def test_it_compiles_for_three_generations_of_gpus():
    lines = output_of(str(HERE / "compile_transposable.py"), "80", "90", "100", TRITON_INTERPRET="0").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"sm_{capability} {dtype}" for capability in (80, 90, 100) for dtype in ("fp32", "bf16", "fp16")
    ]
