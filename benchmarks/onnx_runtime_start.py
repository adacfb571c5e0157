"""What a product has to bring, and how long it takes to its first output: for onnx_runtime.py, or the sizes alone.

python benchmarks/onnx_runtime_start.py
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from openwork.kernels.cpu.onnxruntime_operators import onnxruntime_library

ROOT = Path(__file__).parent.parent

IN_ONNX_RUNTIME = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
if len(sys.argv) > 4: options.register_custom_ops_library(sys.argv[4])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = numpy.load(sys.argv[2])
session.run(None, {each.name: given[str(i)] for i, each in enumerate(session.get_inputs())})
"""
"""File, inputs, threads, and the library of our operators."""
IN_TORCH = """
import sys, torch, openwork
from openwork.utils.torchvision_compat import prepare_torchvision
prepare_torchvision()
torch.set_num_threads(int(sys.argv[2]))
model, example = torch.load(sys.argv[1], weights_only=False)
with torch.inference_mode(): model(**example) if isinstance(example, dict) else model(example)
"""
"""File of a deployed network with its example, threads: packed already, nothing is timed."""


def first_output(what: str, words: Sequence[str], times: int = 3) -> float:
    """Seconds from the start of a process to its first output, the median of some; files are in the page cache. NaN
    where it fails, which is told."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, env=environment)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            print(f"{what}, first output: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return float("nan")
    return statistics.median(seconds)


def needed(name: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """A package and all that it needs, as far as they are installed; extras are left out."""
    try:
        wanted = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # for another platform
        return known
    known |= {name}
    for requirement in wanted:
        other = re.split(r"[^\w.-]", requirement)[0].lower()
        if "extra ==" not in requirement and other not in known:
            known = needed(other, known)
    return known


def bytes_of(name: str) -> int:
    """Bytes of an installed package's files."""
    paths = (Path(str(file.locate())) for file in metadata.files(name) or ())
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc")


def main() -> None:
    library = Path(onnxruntime_library()).stat().st_size
    for name, more in (("onnxruntime", library), ("torch", 0)):
        packages = {each: bytes_of(each) for each in sorted(needed(name))}
        total = (sum(packages.values()) + more) / 1e6
        rest = ", ".join(f"{each} {size / 1e6:.1f}" for each, size in packages.items())
        print(f"{name}: {total:.0f} MB ({rest}{f', our library {more / 1e6:.1f}' if more else ''})")
    files = [file for file in (ROOT / "openwork").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    print(f"openwork: {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
