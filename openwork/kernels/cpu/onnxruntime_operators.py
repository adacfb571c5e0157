"""Where the operators of ONNX Runtime lie: a library of its own, so that a product needs neither Python nor torch."""

from __future__ import annotations

from pathlib import Path

from openwork.kernels.cpu.native import damage

_FILE = Path(__file__).with_name("libopenwork_ort.so")


def onnxruntime_library() -> str:
    """The path of the library with which ONNX Runtime runs files of `to_onnx(..., operators="openwork")`:
    `options.register_custom_ops_library(ow.onnxruntime_library())`. It needs nothing else of this package, so the file
    may be copied. Raises RuntimeError where it was not built or is damaged.

    >>> onnxruntime_library()  # doctest: +SKIP
    '.../openwork/kernels/cpu/libopenwork_ort.so'
    """
    if not _FILE.exists():
        raise RuntimeError(
            f"{_FILE.name} was not built: it takes a C++17 compiler (gcc 9, clang 12 or newer) when openwork is "
            "installed; install it again where there is one"
        )
    if reason := damage(_FILE.read_bytes()):
        raise RuntimeError(f"{_FILE.name} {reason}: install openwork again")
    return str(_FILE)
