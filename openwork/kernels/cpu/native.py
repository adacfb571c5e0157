"""The native library: found, loaded, checked. Without it everything works, slower, and `status` says why.

It is plain C++ behind a C interface (`csrc/`), so one build serves every Python and torch. It runs on torch's own
threads, through the C symbols that libtorch exports for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import warnings
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openwork.kernels.cpu.structs import Compressed as Compressed
from openwork.kernels.cpu.structs import DotProductCall as DotProductCall
from openwork.kernels.cpu.structs import GemmConv2d as GemmConv2d
from openwork.kernels.cpu.structs import GemmLinear as GemmLinear
from openwork.kernels.cpu.structs import GemmWeight as GemmWeight
from openwork.kernels.cpu.structs import GemvCall as GemvCall
from openwork.kernels.cpu.structs import Groups as Groups
from openwork.kernels.cpu.structs import Pixels as Pixels
from openwork.kernels.cpu.structs import Requantize as Requantize
from openwork.kernels.cpu.structs import Slots as Slots
from openwork.layouts.layout import Vectors
from openwork.utils.caller import outside

_ABI = 7
_FILE = Path(__file__).with_name("libopenwork.so")
_MARK = b"openwork"
_in_use: Isa | None = None
"""What `use_isa` chose: replaced whole, so that every call sees one or the other."""


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}

_CALL = (c_int32, c_void_p)
# Name -> (result, arguments). What computes takes the kernels of an instruction set first and returns a status.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "openwork_abi": (c_int32,),
    "openwork_use_threads": (None, c_void_p),
    "openwork_kernels": (c_void_p, c_char_p),
    "openwork_isa": (c_char_p, c_int32),
    "openwork_name": (c_char_p, c_void_p),
    "openwork_lanes": (c_int32, c_void_p),
    "openwork_gemm_columns": (c_int32, c_void_p),
    "openwork_has_dot_product": (c_int32, c_void_p),
    "openwork_size_of": (c_int64, c_int32),
    "openwork_peak": (c_int64, c_void_p, c_int64, c_void_p),
    "openwork_keep": (*_CALL, POINTER(Groups), c_int32, c_void_p, c_void_p),
    "openwork_prune": (*_CALL, POINTER(Groups), c_int32, c_void_p, c_void_p),
    "openwork_decay": (*_CALL, POINTER(Groups), c_int32, c_void_p, c_void_p, c_void_p, c_float),
    "openwork_count_groups": (*_CALL, POINTER(Groups), c_int32, c_uint64, c_void_p, c_int64, c_void_p),
    "openwork_retained": (*_CALL, POINTER(Groups), c_int32, c_void_p, c_int64, c_void_p),
    "openwork_compress": (*_CALL, POINTER(Compressed), POINTER(c_int64)),
    "openwork_slots": (*_CALL, POINTER(Slots), POINTER(c_int64)),
    "openwork_expand": (*_CALL, POINTER(Compressed), c_int64, c_int64, POINTER(c_int32)),
    "openwork_has_crc32": (c_int32,),
    "openwork_crc32": (c_uint32, c_void_p, c_int64, c_uint32),
    "openwork_gemm_linear_scratch": (c_int64, c_void_p, POINTER(GemmLinear)),
    "openwork_gemm_linear": (*_CALL, POINTER(GemmLinear)),
    "openwork_gemm_conv2d_scratch": (c_int64, c_void_p, POINTER(GemmConv2d)),
    "openwork_gemm_conv2d": (*_CALL, POINTER(GemmConv2d)),
    "openwork_gemv": (*_CALL, POINTER(GemvCall), c_int32),
    "openwork_dot_product_scratch": (c_int64, c_void_p, POINTER(DotProductCall), c_int64),
    "openwork_dot_product": (*_CALL, POINTER(DotProductCall), c_int32, c_int64),
    "openwork_quantize": (*_CALL, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "openwork_to_bytes": (*_CALL, c_void_p, c_int64, c_float, c_int32, c_void_p),
    "openwork_from_bytes": (*_CALL, c_void_p, c_int64, c_float, c_int32, c_void_p),
}


@dataclass(frozen=True)
class Isa:
    """The kernels of one instruction set. A call takes one of these, checks its weight by it and hands it to the
    library: so it keeps its instruction set to the end, whatever `use_isa` chooses meanwhile."""

    lib: Any
    kernels: int
    name: str
    lanes: int
    columns: int
    dot_product: bool

    @classmethod
    def of(cls, lib: Any, name: str | None) -> Isa | None:
        """By name, or the best for None; None where this machine has none of the name."""
        kernels = lib.openwork_kernels(name.encode() if name else None)
        if kernels is None:
            return None
        numbers = (lib.openwork_lanes(kernels), lib.openwork_gemm_columns(kernels))
        has_dot_product = bool(lib.openwork_has_dot_product(kernels))
        return cls(lib, kernels, lib.openwork_name(kernels).decode(), *numbers, has_dot_product)


@dataclass(frozen=True)
class Status:
    """What runs the operators. `isa` is the instruction set in use, None where there is no native library, and then
    `reason` says why. `available` are the instruction sets that this machine could use, best first; `threads` is
    "torch" or, where libtorch does not export its thread pool, "none"."""

    isa: str | None
    available: tuple[str, ...] = ()
    threads: str = "none"
    reason: str = ""

    def __str__(self) -> str:
        if self.isa is None:
            return f"no native kernels: {self.reason}"
        return f"native kernels: {self.isa} (of {', '.join(self.available)}), threads of {self.threads}"


def native_status() -> Status:
    """What is loaded and, if nothing, why."""
    lib, reason = _open()
    here = isa()
    if here is None:
        return Status(None, reason=reason)
    return Status(here.name, _available(lib), "torch" if _thread_pool() else "none")


@functools.cache
def warn_without_library() -> None:
    """Warn, once in a process, where there is no native library."""
    if (here := native_status()).isa is None:
        warnings.warn(f"everything works without the native kernels, slower ({here})", stacklevel=outside())


def library() -> Any:
    """The native library, or None."""
    return _open()[0]


def isa() -> Isa | None:
    """The kernels in use, or None where there is no library. A call asks once."""
    return None if _open()[0] is None else _in_use


def vectors() -> Vectors:
    """What weights are packed for: the vectors of the instruction set in use."""
    here = isa()
    return Vectors() if here is None else Vectors(here.lanes, here.columns, here.dot_product)


def use_isa(name: str | None) -> str:
    """Choose an instruction set of `status().available`, or the best for None, and return its name. Calls that run go
    on with theirs; weights packed for vectors of another size are refused afterwards, and must be packed again. The
    variable OPENWORK_ISA does the same when the library is loaded."""
    global _in_use
    lib = library()
    if lib is None:
        raise RuntimeError(str(native_status()))
    chosen = Isa.of(lib, name)
    if chosen is None:
        raise ValueError(f"instruction set {name!r}; this machine and build have {', '.join(_available(lib))}")
    _in_use = chosen
    return chosen.name


def address(tensor: torch.Tensor | None, count: int | None = None) -> int | None:
    """Where the numbers of a tensor begin, `count` of them in one stretch of memory, all by default. Raises ValueError
    where there are fewer: FSDP and others free the memory of a tensor that keeps its shape. Of what has no memory, or
    none that the library could read (meta, sparse, functorch), torch raises."""
    if tensor is None:
        return None
    storage, needed = tensor.untyped_storage(), tensor.storage_offset() + (tensor.numel() if count is None else count)
    if storage.nbytes() < needed * tensor.itemsize:
        raise ValueError(
            f"a tensor {tuple(tensor.shape)} of {tensor.dtype} has {storage.nbytes()} bytes of memory, and needs "
            f"{needed * tensor.itemsize}: its memory was freed or resized; gather or load it first"
        )
    return tensor.data_ptr()


def done(status: int) -> None:
    """Raises what a call of the library says."""
    if status == 1:
        raise MemoryError("the native library got no memory for a matmul")
    if status == 2:
        raise ValueError("an offset of the packed weight is none of its tile: the weight is damaged, pack it again")


@functools.cache
def _open() -> tuple[Any, str]:
    """The library, or None and the reason."""
    global _in_use
    if os.environ.get("OPENWORK_ISA") == "none":
        return None, "OPENWORK_ISA=none"
    if not _FILE.exists():
        return None, f"{_FILE.name} was not built: it takes a C++17 compiler (gcc 9, clang 12 or newer) at installation"
    if reason := damage(_FILE.read_bytes()):
        return None, f"{_FILE.name} {reason}: install again"
    try:
        lib = ctypes.CDLL(str(_FILE))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{_FILE.name} does not load: {error}; install again"
    if lib.openwork_abi() != _ABI:
        return None, f"{_FILE.name} has interface {lib.openwork_abi()}, needed {_ABI}: install again"
    wanted = os.environ.get("OPENWORK_ISA") or None
    chosen = Isa.of(lib, wanted)
    if chosen is None:
        raise ValueError(f"OPENWORK_ISA={wanted}; this machine and build have none, {', '.join(_available(lib))}")
    lib.openwork_use_threads(_thread_pool())
    _in_use = chosen
    return lib, ""


def damage(library: bytes) -> str:
    """What is wrong with a library of Linux: the linker's bytes, then `_MARK`, then their SHA-256, both written by
    setup.py. A file cut short would end the process where a page is missing. Empty where nothing is."""
    body, mark = library[:-40], library[-40:-32]
    if not library.startswith(b"\x7fELF"):
        return ""  # of other systems the loader checks the size itself; what is no library it refuses
    if mark != _MARK:
        return f"is not as it was built: its {len(library)} bytes do not end with their checksum"
    return "" if hashlib.sha256(body).digest() == library[-32:] else "is damaged: its checksum differs"


def _available(lib: Any) -> tuple[str, ...]:
    names = (lib.openwork_isa(rank) for rank in range(16))
    return tuple(name.decode() for name in names if name)


@functools.cache
def _thread_pool() -> int | None:
    """The address of libtorch's `torch_parallel_for`, which is C and needs no headers."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(torch_cpu.torch_parallel_for, c_void_p).value
    except (OSError, AttributeError):
        return None
