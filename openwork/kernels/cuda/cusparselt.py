"""2:4 matmuls on NVIDIA's sparse tensor cores, by operators that torch has without a public name. They are named here
alone; where they are missing no weight is taken, and `backend_refusal` says why.

    B = rows of input, O = outputs, K = inputs

A backend packs a weight (O, K) whose groups of four hold at most two non-zeros, and multiplies (B, K) by it. What it
packs belongs to a library version and a GPU, so it is never stored: `unpack` gives the weight back. cuSPARSELt has
several algorithms for each shape; which is fastest, with which split of sums, is searched once and kept.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openwork.kernels.cuda import algorithm_cache
from openwork.layouts.layout import Algorithm, KernelRefused
from openwork.nm.groups import Axis
from openwork.nm.masks import too_dense
from openwork.nm.pattern import Pattern
from openwork.nm.quantize import QUANTIZED
from openwork.ops.library import library
from openwork.utils.caller import outside
from openwork.utils.counted import counted

PATTERN = Pattern(2, 4)
DEFAULT: Algorithm = (0, 1, -1)
"""An algorithm of cuSPARSELt: its number, into how many parts sums are split, and how the parts are added."""
_SLOW_ON_HOPPER = "0.8.0"  # of cuSPARSELt: slower on H100 and L4, repaired in 0.8.1 (NVIDIA's release notes)
PACKAGES = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")

library.define(
    "semi_structured_linear(Tensor x, Tensor packed, Tensor? meta, Tensor? bias, str backend, int outputs, "
    "int[] algorithm, ScalarType out) -> Tensor"
)


@dataclass(frozen=True)
class Backend:
    """`units`: dtype -> what O, K and B must be multiples of. `pack(weight)` gives the packed weight and, apart from
    it or None, where its values lie. `product(x, packed, meta, bias, outputs, algorithm, out)` is (B, O). `search`,
    of the same arguments, gives the fastest algorithm. `missing(device)` says why it does not run there."""

    units: Mapping[torch.dtype, tuple[int, int, int]]
    pack: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    product: Callable[..., Tensor]
    search: Callable[..., Algorithm]
    missing: Callable[[torch.device], str]
    version: Callable[[], str]


def _lt_pack(weight: Tensor) -> tuple[Tensor, None]:
    return torch._cslt_compress(weight), None


def _lt_product(
    x: Tensor, packed: Tensor, _: None, bias: Tensor | None, outputs: int, algorithm: Algorithm, out: torch.dtype
) -> Tensor:
    number, parts, mode = algorithm
    how: dict[str, Any] = {"alg_id": number, "split_k": parts, "split_k_mode": mode}
    asked = None if out == x.dtype else out
    return torch._cslt_sparse_mm(packed, x.t(), bias, out_dtype=asked, transpose_result=True, **how)


def _lt_search(x: Tensor, packed: Tensor, _: None, bias: Tensor | None, outputs: int, out: torch.dtype) -> Algorithm:
    asked = None if out == x.dtype else out
    library: Any = torch._C._cusparselt
    with torch.cuda.device(x.device):  # no operator of torch's, so nothing else sets it
        number, parts, mode, _most = library.mm_search(packed, x.t(), bias, None, asked, True)
    return int(number), int(parts), int(mode)


def _lt_missing(device: torch.device) -> str:
    if not (hasattr(torch, "_cslt_sparse_mm") and torch.backends.cusparselt.is_available()):
        return "this torch has no cuSPARSELt"
    return _too_old(device)


def _cutlass_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    return sparse_semi_structured_from_dense_cutlass(weight)


def _cutlass_product(
    x: Tensor, packed: Tensor, meta: Tensor, bias: Tensor | None, outputs: int, algorithm: Algorithm, out: torch.dtype
) -> Tensor:
    if bias is None:
        return torch._sparse_semi_structured_mm(packed, meta, x.t()).t().contiguous()
    return torch._sparse_semi_structured_addmm(bias, packed, meta, x.t()).t().contiguous()


def _cutlass_missing(device: torch.device) -> str:
    if not hasattr(torch, "_sparse_semi_structured_addmm"):
        return "this torch has no CUTLASS products"
    if _too_old(device):
        return _too_old(device)
    major = torch.cuda.get_device_capability(device)[0]
    return "" if major == 8 else f"torch's CUTLASS products are for compute capability 8.x; this GPU has {major}.x"


def _too_old(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        return "2:4 products need an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"2:4 products need compute capability 8.0 or newer; this GPU has {major}.{minor}"


def _lt_version() -> str:
    return f"cuSPARSELt {_lt_number()}"


@functools.cache
def _lt_number() -> str:
    """Of the library that is loaded: of the package that torch depends on; torch itself knows the one that it was built
    with."""
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    built = torch.backends.cusparselt.version()
    return "none" if built is None else f"{built // 1000}.{built // 100 % 10}.{built % 100}"


_HALVES = (torch.float16, torch.bfloat16)

BACKENDS: Mapping[str, Backend] = {
    "cusparselt": Backend(
        dict.fromkeys(_HALVES, (16, 16, 8)) | dict.fromkeys(QUANTIZED, (32, 32, 16)),
        _lt_pack,
        _lt_product,
        _lt_search,
        _lt_missing,
        _lt_version,
    ),
    "cutlass": Backend(
        dict.fromkeys(_HALVES, (32, 64, 8)),
        _cutlass_pack,
        _cutlass_product,
        lambda *_: DEFAULT,
        _cutlass_missing,
        lambda: "CUTLASS",
    ),
}


def backend_refusal(backend: str, weight_dtype: torch.dtype, device: torch.device) -> str:
    """Why a backend multiplies by no weight in a dtype there; empty where it does.

    >>> backend_refusal("cusparselt", torch.float32, torch.device("cpu"))
    'torch has no sparse product of torch.float32: choose weight_dtype=torch.bfloat16, or convert the model'
    """
    known = BACKENDS[backend]
    if weight_dtype not in known.units:
        return (
            f"torch has no sparse product of {weight_dtype}: choose weight_dtype=torch.bfloat16, or convert the model"
        )
    return known.missing(device)


def weight_refusal(weight: Tensor) -> str:
    """Why no sparse tensor core multiplies by a weight (O, K); empty where one does."""
    if problem := too_dense(weight, PATTERN, Axis(1)):
        return f"{problem}: sparse tensor cores multiply {PATTERN}"
    return "" if bool(weight.isfinite().all()) else "the weight holds numbers that are not finite"


@contextlib.contextmanager
def library_calls() -> Iterator[None]:
    """An error of the library is its refusal."""
    try:
        yield
    except RuntimeError as error:
        raise KernelRefused(str(error)) from error


@dataclass(frozen=True)
class Packed:
    """A weight as one backend keeps it on one GPU. `shape` is the weight's, `padded` what was packed."""

    values: Tensor
    meta: Tensor | None
    backend: str
    shape: tuple[int, int]
    padded: tuple[int, int]


def pack_2_4(weight: Tensor, backend: str) -> Packed:
    """Pack a weight (O, K) in a dtype of the backend, filled up with zeros to the shape that it needs, and compare what
    comes out again: a library that packs something else is found here. Raises KernelRefused then, and ValueError for a
    weight or a device that the backend does not take."""
    O, K = weight.shape
    reason = backend_refusal(backend, weight.dtype, weight.device) or weight_refusal(weight.float())
    if reason:
        raise ValueError(f"a weight {tuple(weight.shape)} on {weight.device} cannot be packed by {backend}: {reason}")
    rows, columns, _ = BACKENDS[backend].units[weight.dtype]
    padded = _padded(weight, (-K % columns, -O % rows))
    with library_calls():
        values, meta = BACKENDS[backend].pack(padded)
    made = Packed(values, meta, backend, (O, K), (padded.shape[0], padded.shape[1]))
    again = unpack(made)
    if not torch.equal(again.float(), weight.float()):
        wrong = int((again.float() != weight.float()).sum())
        raise KernelRefused(
            f"{BACKENDS[backend].version()} packs {wrong} of {weight.numel()} weights {tuple(weight.shape)} wrongly on "
            f"{weight.device}: leave the layer dense, and report it to PyTorch"
        )
    return made


def unpack(packed: Packed, rows: int = 1024) -> Tensor:
    """The dense weight (O, K): the packed one times the identity, `rows` columns at a time. Exact, as every sum has one
    term that is not zero."""
    O, K = packed.shape
    KP = packed.padded[1]
    dtype = packed.values.dtype
    out = torch.int32 if dtype == torch.int8 else torch.float32 if dtype in QUANTIZED else dtype
    parts = []
    for first in range(0, KP, rows):
        count = min(rows, KP - first)
        unit = torch.zeros(count, KP, dtype=torch.float32, device=packed.values.device)
        unit.diagonal(first).fill_(1)
        product = multiply(unit.to(dtype), packed, None, DEFAULT, out)
        parts.append(product[:, :O].t().to(dtype))
    return torch.cat(parts, dim=1)[:, :K].contiguous()


def multiply(x: Tensor, packed: Packed, bias: Tensor | None, algorithm: Algorithm, out: torch.dtype) -> Tensor:
    """(B, K) times the weight: (B, O padded), in `out`. `bias` has O padded numbers."""
    x = _padded(x, (packed.padded[1] - x.shape[1], 0)).contiguous()
    operator = torch.ops.openwork.semi_structured_linear.default
    return operator(x, packed.values, packed.meta, bias, packed.backend, packed.padded[0], algorithm, out)


@torch.library.impl(library, "semi_structured_linear", "CompositeExplicitAutograd")
def _semi_structured_linear(
    x: Tensor,
    packed: Tensor,
    meta: Tensor | None,
    bias: Tensor | None,
    backend: str,
    outputs: int,
    algorithm: list[int],
    out: torch.dtype,
) -> Tensor:
    known, B = BACKENDS[backend], len(x)
    if B == 0:
        return x.new_empty(0, outputs, dtype=out)
    whole = _padded(x, (0, -B % known.units[x.dtype][2])).contiguous()
    try:
        y = known.product(whole, packed, meta, bias, outputs, tuple(algorithm), out)
    except RuntimeError as error:
        if tuple(algorithm) == DEFAULT:
            raise KernelRefused(str(error)) from error
        warnings.warn(
            f"{known.version()} refuses algorithm {algorithm} for {tuple(whole.shape)} by "
            f"{counted(outputs, 'output')}, which was searched for other rows or by another library, and its own "
            f"choice is taken: {error}",
            stacklevel=outside(),
        )
        with library_calls():
            y = known.product(whole, packed, meta, bias, outputs, DEFAULT, out)
    return y[:B]


@torch.library.register_fake("openwork::semi_structured_linear")
def _(x, packed, meta, bias, backend, outputs, algorithm, out):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], outputs, dtype=out)


def _padded(matrix: Tensor, more: tuple[int, int]) -> Tensor:
    """With so many columns and rows of zeros more."""
    if not any(more):
        return matrix
    wide = matrix.new_zeros(matrix.shape[0] + more[1], matrix.shape[1] + more[0])  # `pad` lacks float8
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    return wide


def algorithm_for(x: Tensor, packed: Packed, bias: Tensor | None, out: torch.dtype) -> Algorithm:
    """The fastest algorithm for these rows: from the file, or searched now and written there."""
    known = BACKENDS[packed.backend]
    units = known.units[packed.values.dtype][2]
    whole = _padded(x, (packed.padded[1] - x.shape[1], -len(x) % units)).contiguous()
    shape = f"{packed.padded[0]}x{packed.padded[1]}x{len(whole)}"
    key = f"{shape} {packed.values.dtype} to {out}{'' if bias is None else ', bias'}"
    file, where = algorithm_cache.file_of_user(), gpu_environment(x.device)
    algorithm = algorithm_cache.read(file).get(where, {}).get(key)
    if algorithm is None:
        with library_calls():
            algorithm = known.search(whole, packed.values, packed.meta, bias, packed.padded[0], out)
        algorithm_cache.add(file, where, key, algorithm)
    return algorithm


def gpu_environment(device: torch.device) -> str:
    """What an algorithm belongs to: GPU, cuSPARSELt, torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, {BACKENDS['cusparselt'].version()}, torch {torch.__version__}"


def version_warning(device: torch.device) -> str:
    """What is known to be wrong with the cuSPARSELt at hand for a GPU; empty if nothing is."""
    slow = _lt_number().startswith(_SLOW_ON_HOPPER)
    if slow and torch.cuda.get_device_capability(device) in ((9, 0), (8, 9)):
        return "cuSPARSELt 0.8.0 is slow on this GPU: install nvidia-cusparselt 0.8.1 or newer"
    return ""
