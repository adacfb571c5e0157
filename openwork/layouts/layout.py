"""A kernel kind is one class: how it wants a compressed weight in memory, which layers it takes, how it multiplies.

    O = outputs, K = inputs, B = rows of input

To add one: a subclass of `Layout` in a file of its own, registered by name. What plans, deploys, saves, loads and
benchmarks asks the registry, and knows no kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwork.layouts.conv import ConvGeometry
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask, too_dense
from openwork.nm.pattern import Pattern
from openwork.utils.counted import counted

Algorithm = tuple[int, int, int]
"""One of several by which a library multiplies: three numbers that it understands."""
_PART = 1 << 18  # weights that are packed at once: bounds temporary memory


class KernelRefused(RuntimeError):
    """A library does not do what its kind was asked for. The layer stays dense; any other error is one."""


@dataclass(frozen=True)
class Vectors:
    """The native kernels of this CPU: float32 `lanes` in a vector, `columns` that GEMM takes at once, and whether it
    has dot products of short numbers. The defaults are those without the native library."""

    lanes: int = 8
    columns: int = 64
    dot_product: bool = False


@dataclass(frozen=True)
class Request:
    """A layer that asks for a kernel: its `pattern`, its own `dtype` and the one to keep the weight in; its geometry
    where it is a convolution; the most `rows` of input it was called with; whether its weight is `finite`."""

    pattern: Pattern
    dtype: torch.dtype
    weight_dtype: torch.dtype
    device: torch.device
    vectors: Vectors
    conv: ConvGeometry | None = None
    rows: int = 1
    finite: bool = True


class Layout(nn.Module, ABC):
    """A weight (O, K) as one kernel reads it: tensors, which are buffers, and `numbers`, a named tuple of integers that
    begins with the pattern and ends with the shape, and for operators a list, `integers`. A module, so that whatever
    walks a model finds its memory."""

    name: ClassVar[str]
    device_type: ClassVar[str]
    weight_dtypes: ClassVar[tuple[torch.dtype, ...]]
    best_rows: ClassVar[range]
    """Rows of input that it is made for; it may take others."""
    operands: ClassVar[tuple[str, ...]] = ()
    """The buffers that its operator takes, in this order; the last may be None."""
    Numbers: ClassVar[Any] = None
    """The class of `numbers`. A kind with an operator needs it, and `operands`: the operator is given no layout but
    tensors and integers, and its reference makes the layout of them by `of`."""
    times_channels_last: ClassVar[bool] = False
    """Whether convolutions are timed on images with their channels last as well."""
    algorithms: Mapping[int, Algorithm] = MappingProxyType({})
    """By rows of input, the algorithm that was the fastest, where there are several."""

    numbers: Any
    """A `NamedTuple` of integers: n, m, what the kind needs, outputs, inputs. All that the operator is told."""

    def __init__(self, tensors: Mapping[str, Tensor | None], numbers: Any):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._take_numbers(numbers)

    def _take_numbers(self, numbers: Any) -> None:
        self.numbers, self.integers = numbers, list(numbers)
        self.pattern = Pattern(numbers.n, numbers.m)
        self.shape: tuple[int, int] = (numbers.outputs, numbers.inputs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle may come from anyone: what is derived is derived again."""
        super().__setstate__(state)
        self._take_numbers(self.numbers)

    @classmethod
    def of(cls, packed: Sequence[Tensor], numbers: Sequence[int]) -> Layout:
        """From what its operator is given: the inverse of `tensors` and `integers`, which works for every kind whose
        `__init__` is this one. Raises ValueError where there are too many or too few integers."""
        return cls(
            dict.fromkeys(cls.operands) | dict(zip(cls.operands, packed, strict=False)), numbers_of(cls, numbers)
        )

    def tensors(self) -> list[Tensor]:
        """The tensors, as its operator takes them."""
        buffers: Any = self._buffers  # attributes of a module take long enough to count in a layer of one row
        tensors = [buffers[name] for name in self.operands]
        return tensors if tensors[-1] is not None else tensors[:-1]

    @classmethod
    @abstractmethod
    def refusal(cls, request: Request) -> str:
        """Why it cannot take a layer; empty where it can. Of `weight_dtypes` it need not say anything."""

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor, scales: Tensor | None, pattern: Pattern, vectors: Vectors) -> Layout:
        """Of a weight (O, K) in one of `weight_dtypes`, and its scales where it is quantized. Raises ValueError where a
        group holds more than N non-zeros."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """Inverse of `pack`: the weight (O, K), zeros filled in; of a quantized one the quantized numbers."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """(..., K) to (..., O), in the dtype of x. `bias` (O,) float32."""

    def conv2d(self, x: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool) -> Tensor:
        """(N, C, H, W) to (N, O, ., .), in the dtype of x, by a kind that takes convolutions."""
        raise TypeError(f"the kernel {self.name} is for linear layers")

    @classmethod
    def multiplies(cls, weight_dtype: torch.dtype) -> tuple[torch.dtype, int]:
        """What a benchmark's bounds need: the dtype of the inputs that it reads, and how many multiply-adds it does in
        the time of one in float32."""
        return torch.float32, 1

    @classmethod
    def stand_in(cls, vectors: Vectors) -> type[Layout]:
        """The kind that takes its place on a CPU that lacks it."""
        return cls

    def check_contents(self) -> None:
        """Raises ValueError where offsets or indices are damaged. Called when a layer is unpickled, so that damage is
        told there, and by references. A kernel does not rely on it: it bounds what it reads."""

    def on(self, vectors: Vectors) -> Layout:
        """As a CPU with these vectors reads it: itself, or packed anew to the same numbers."""
        return self

    def search(self, x: Tensor, geometry: ConvGeometry | None = None) -> None:
        """Find the fastest algorithm for an input like this one, where there are several."""

    def take_bias(self, bias: Tensor | None) -> None:
        """Keep the bias (O,) in the form that the kernel reads, where that is another than float32."""

    def take(self, other: Layout) -> None:
        """The weight of another one of this kind and shape, in the memory of this one where it fits: a CUDA graph may
        read it there."""
        for name, tensor in other._buffers.items():
            before = self._buffers.get(name)
            if before is None or tensor is None or before.is_inference() or not _same_form(before, tensor):
                self.register_buffer(name, tensor, persistent=False)
            else:
                before.copy_(tensor)
        self._take_numbers(other.numbers)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.buffers())

    def __repr__(self) -> str:
        return f"{self.name}({self.pattern}, {self.shape})"


Kind = type[Layout]
AnyKind = TypeVar("AnyKind", bound=Kind)

KINDS: dict[str, Kind] = {}
"""The kinds by name, in the order in which they were imported; of equally fast ones the first is chosen."""


def register_kind(kind: AnyKind) -> AnyKind:
    """Make a kind known by its name. Raises ValueError where another bears it."""
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"two kernel kinds are named {kind.name!r}: {KINDS[kind.name].__qualname__} is one")
    return kind


def kinds_on(device_type: str) -> list[Kind]:
    """Those for tensors of a device."""
    return [kind for kind in KINDS.values() if kind.device_type == device_type]


def kind_named(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"no kernel is named {name!r}; there are {', '.join(KINDS)}")
    return KINDS[name]


def refusal_of(kind: Kind, request: Request) -> str:
    """Why a kind cannot take a layer, by its own word or by its `weight_dtypes`; empty where it can."""
    if reason := kind.refusal(request):
        return reason
    known = ", ".join(map(str, kind.weight_dtypes))
    return "" if request.weight_dtype in kind.weight_dtypes else f"{kind.name} keeps no {request.weight_dtype}: {known}"


def numbers_of(kind: Any, numbers: Sequence[int]) -> Any:
    """The integers of a layout by name. Raises ValueError where there are too many or too few."""
    fields = kind.Numbers._fields
    if len(numbers) != len(fields):
        raise ValueError(
            f"{counted(len(numbers), 'number')} of a layout, {list(numbers)}; {kind.name} needs {', '.join(fields)}"
        )
    return kind.Numbers(*numbers)


def _same_form(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def check_packable(weight: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}; a layout needs one of outputs and inputs, at least one of each"
        )
    if weight.dtype not in dtypes:
        raise TypeError(f"weight of {weight.dtype}; needed one of {', '.join(map(str, dtypes))}")


def parts(weight: Tensor, pattern: Pattern, more: int, lanes: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some outputs at a time, so that packing takes little memory beside the weight: the first, their weights with
    `more` inputs and whole `lanes` of outputs, and which of them have slots: exactly N of each group."""
    together = max(1, _PART // (lanes * weight.shape[1])) * lanes
    for first, part in enumerate(weight.split(together)):
        padded = F.pad(part, (0, more, 0, -len(part) % lanes))
        keep = magnitude_mask(padded.abs() if weight.is_floating_point() else padded.float().abs(), pattern, Axis(1))
        if bool((padded != 0).logical_and_(~keep).any()):
            problem = too_dense(weight, pattern, Axis(1))
            raise ValueError(f"the weight {tuple(weight.shape)} is not {pattern}: {problem}")
        yield first * together, padded, keep
