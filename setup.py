"""Builds `openwork/kernels/cpu/libopenwork.so`, the native library, from csrc/, and `libopenwork_ort.so` beside it, the
same kernels as operators of ONNX Runtime: C++17, no headers of Python, torch or ONNX Runtime.

Everything else is in pyproject.toml. Each file of an instruction set gets its own flags; the library chooses at run
time. A compiler that fails is an error. Without any, or with OPENWORK_NO_NATIVE=1, the package is installed without the
library: everything works, slower.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

if not os.environ.get("CXX", "unset"):
    del os.environ["CXX"]  # empty: setuptools would call a compiler without a name

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-g0",
]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc's own AVX-512 headers
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
ISAS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
        "avx512vbmi": [*AVX512, "-mavx512vnni", "-mavx512vbmi"],
        "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"],
    },
    "aarch64": {"neon": []},
}
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
SOURCES = {
    "dispatch": [],
    "gemm": [],
    "gemv": [],
    "dot_product": [],
    "checksum": [],
    "scalar": [],
    **ISAS.get(MACHINE, {}),
}
ORT = "openwork.kernels.cpu.libopenwork_ort"
# Of ONNX Runtime's operators, which are linked with the same kernels and export one function.
ORT_SOURCES: dict[str, list[str]] = {f"onnxruntime/{name}": [] for name in ("weight", "host", "operators")}
ORT_EXPORTS = {
    "linux": ["-Wl,--version-script=csrc/onnxruntime/exports.map"],
    "darwin": ["-Wl,-exported_symbol,_RegisterCustomOps"],
}.get(sys.platform, [])


class BuildNative(build_ext):
    """One shared library with flags for each file, named without the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)  # of an earlier build: never older than the sources
        is_ort = extension.name == ORT
        if reason := self._no_native():
            if not is_ort:  # once for both
                say_last(
                    f"warning: openwork is installed without its native library; everything works, slower: {reason}"
                )
            return
        try:
            objects = self._objects(SOURCES) + (self._objects(ORT_SOURCES) if is_ort else [])
            flags = ["-pthread", *(ORT_EXPORTS if is_ort else [])]
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(objects, str(target), target_lang="c++", extra_postargs=flags)
            add_checksum(target)
        except (CompileError, LinkError) as error:  # the compiler has printed its own message
            raise type(error)(
                f"{error}: the native library was not built, see the compiler's message above; it takes a C++17 "
                "compiler (gcc 9, clang 12 or newer). CXX names another; OPENWORK_NO_NATIVE=1 installs without, slower"
            ) from error

    def _objects(self, sources: dict[str, list[str]]) -> list[str]:
        """Compiled, each once for both libraries."""
        compiled = self.__dict__.setdefault("_compiled", {})
        missing = [(name, flags) for name, flags in sources.items() if name not in compiled]
        with ThreadPoolExecutor(2) as pool:
            compiled.update(zip((name for name, _ in missing), pool.map(self._compile, missing), strict=True))
        return [path for name in sources for path in compiled[name]]

    def _no_native(self) -> str:
        """Why nothing is compiled, or nothing."""
        if os.environ.get("OPENWORK_NO_NATIVE") == "1":
            return "OPENWORK_NO_NATIVE=1"
        command = getattr(self.compiler, "compiler_so_cxx", None) or getattr(self.compiler, "compiler_so", None)
        if command and not os.environ.get("CXX") and shutil.which(command[0]) is None:
            return f"there is no C++ compiler here ({command[0]}); install gcc 9, clang 12 or newer, and openwork again"
        return ""

    def _compile(self, source: tuple[str, list[str]]) -> list[str]:
        name, flags = source
        options = {"include_dirs": ["csrc"], "depends": [str(path) for path in Path("csrc").rglob("*")]}
        try:
            return self.compiler.compile([f"csrc/{name}.cpp"], self.build_temp, extra_postargs=FLAGS + flags, **options)
        except CompileError:
            if name != "avx512bf16":
                raise
            print("warning: this compiler knows no AVX-512 BF16: its kernels are left out", file=sys.stderr)
            return self.compiler.compile(
                [f"csrc/{name}.cpp"], self.build_temp, extra_postargs=[*FLAGS, "-DTOO_NEW"], **options
            )

    def copy_extensions_to_source(self) -> None:
        if any(Path(path).exists() for path in self.get_outputs()):
            super().copy_extensions_to_source()


def add_checksum(library: Path) -> None:
    """Append what `openwork.kernels.cpu.native.damage` looks for: eight bytes and the SHA-256 of what is before them.
    Only on Linux, whose loader reads past the end of a file that was cut short."""
    body = library.read_bytes()
    if body.startswith(b"\x7fELF"):
        library.write_bytes(body + b"openwork" + hashlib.sha256(body).digest())


def say_last(text: str) -> None:
    """Print at the end of the process, below all that the build prints."""
    atexit.register(print, text, file=sys.stderr)


class AnyPython(bdist_wheel):
    """The library is loaded with ctypes: one wheel for every Python on a platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension("openwork.kernels.cpu.libopenwork", [f"csrc/{name}.cpp" for name in SOURCES]),
        Extension(ORT, [f"csrc/{name}.cpp" for name in {**SOURCES, **ORT_SOURCES}]),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
