"""Which kernel runs an operator on which device: one table.

An operator (`openwork.ops`) has a reference, which runs everywhere. A kernel is a function with the operator's
arguments, and has a row here: (operator, "CPU" or "CUDA") -> "module:function". A kernel that cannot take what it is
given calls the reference itself. CPU modules are imported with openwork; those of a GPU need Triton, so they are
imported at the first call, and the reference runs where there is no Triton.

To add one: write the function, add its row to `KERNELS`. What is not part of the package calls `register`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, overload

from openwork.kernels.cpu import native
from openwork.kernels.cuda import triton
from openwork.ops.library import REFERENCES, library
from openwork.utils.torch_private import constant_when_compiled

_CPU = "openwork.kernels.cpu"
_CUDA = "openwork.kernels.cuda.triton"

KERNELS: dict[tuple[str, str], str] = {
    ("foreach_mask", "CPU"): f"{_CPU}.masks:foreach_mask",
    ("foreach_prune", "CPU"): f"{_CPU}.masks:foreach_prune",
    ("foreach_decay", "CPU"): f"{_CPU}.masks:foreach_decay",
    ("slots", "CPU"): f"{_CPU}.slots:slots",
    ("gemm_linear", "CPU"): f"{_CPU}.linear:gemm_linear",
    ("gemv_linear", "CPU"): f"{_CPU}.linear:gemv_linear",
    ("dot_product_linear", "CPU"): f"{_CPU}.linear:dot_product_linear",
    ("gemm_conv2d", "CPU"): f"{_CPU}.conv:gemm_conv2d",
    ("dot_product_conv2d", "CPU"): f"{_CPU}.conv:dot_product_conv2d",
    ("to_bytes", "CPU"): f"{_CPU}.bytes:to_bytes",
    ("from_bytes", "CPU"): f"{_CPU}.bytes:from_bytes",
    ("bytes_linear", "CPU"): f"{_CPU}.bytes:bytes_linear",
    ("bytes_conv2d", "CPU"): f"{_CPU}.bytes:bytes_conv2d",
    ("foreach_mask", "CUDA"): f"{_CUDA}.masks:foreach_mask",
    ("foreach_prune", "CUDA"): f"{_CUDA}.masks:foreach_prune",
    ("foreach_decay", "CUDA"): f"{_CUDA}.masks:foreach_decay",
    ("foreach_transposable_mask", "CUDA"): f"{_CUDA}.transposable:foreach_transposable_mask",
    ("foreach_pack", "CUDA"): f"{_CUDA}.bits:foreach_pack",
    ("foreach_packed_sad", "CUDA"): f"{_CUDA}.bits:foreach_packed_sad",
    ("skinny_gather_linear", "CUDA"): f"{_CUDA}.skinny:skinny_gather_linear",
    ("skinny_expand_linear", "CUDA"): f"{_CUDA}.skinny:skinny_expand_linear",
}


def register(operator: str, device: str, kernel: Callable[..., Any]) -> None:
    """Let `kernel` run `openwork::operator` on tensors of a device, "CPU" or "CUDA"."""
    library.impl(operator, kernel, device)


def register_all() -> None:
    """Register every row of the table. Called once, by `openwork.kernels`."""
    for (operator, device), place in KERNELS.items():
        register(operator, device, _imported(place) if device == "CPU" else _on_demand(operator, place))


@constant_when_compiled
def available(device: str) -> bool:
    """Whether kernels of ours run on tensors of a device, "cpu" or "cuda"; without, references do."""
    return native.library() is not None if device == "cpu" else triton.is_available()


@overload
def status(device: Literal["cpu"] = "cpu") -> native.Status: ...
@overload
def status(device: Literal["cuda"]) -> str: ...
def status(device: Literal["cpu", "cuda"] = "cpu") -> native.Status | str:
    """What runs on tensors of a device and, if nothing of ours, why."""
    return native.native_status() if device == "cpu" else triton.triton_status()


def _imported(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    kernel: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return kernel


def _on_demand(operator: str, place: str) -> Callable[..., Any]:
    """The kernel, imported at its first call; the reference as long as there is no Triton."""
    kernel = functools.cache(functools.partial(_imported, place))

    def run(*arguments: Any) -> Any:
        return (kernel() if triton.is_available() else REFERENCES[operator])(*arguments)

    return run
