"""What each weight is multiplied with, seen in the products of calibration batches: where the matrices lie in its
memory, and the Gram matrix of the inputs of each.

    B = matrices: experts, groups of a convolution, taps;  R = rows (outputs);  K = columns (inputs);  S = samples
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.nm.groups import reduction_size
from openwork.training.matmul_trace import Multiplied, Operand, storage_key
from openwork.training.operands import Factor
from openwork.training.select import Candidate

_WHOLE = 4608  # columns of a convolution, taps times channels, up to which it is solved as one matrix: 3x3 on 512
_AT_ONCE = 2**24  # numbers of an unfolded convolution at a time

Samples = Iterator[tuple[slice, Tensor]]
"""Inputs (b, S, K) of some of the B matrices."""


class NotFinite(ValueError):
    """A calibration batch brought a weight NaN or infinity."""


@dataclass(frozen=True)
class Place:
    """B matrices (R, K) in the memory of a weight: a view whose first `batched` dims are B, and whose last `summed` are
    K. The last dim is the one along which groups run."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    batched: int = 0
    summed: int = 1

    @property
    def size(self) -> tuple[int, int, int]:
        """B, R, K."""
        rest = len(self.shape) - self.summed
        sizes = self.shape[: self.batched], self.shape[self.batched : rest], self.shape[rest:]
        return math.prod(sizes[0]), math.prod(sizes[1]), math.prod(sizes[2])

    @property
    def width(self) -> int:
        """Columns in a run of groups."""
        return self.shape[-1]

    def view(self, weight: Tensor) -> Tensor:
        return weight.as_strided(self.shape, self.stride, self.offset)

    def read(self, weight: Tensor) -> Tensor:
        """A copy (B, R, K), in single precision at least."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return self.view(weight).to(dtype, copy=True).reshape(self.size)

    def write(self, weight: Tensor, values: Tensor) -> None:
        self.view(weight).copy_(values.view(self.shape))


@dataclass
class Part:
    """Some matrices of a weight, and what was seen of their inputs: `gram` (B, K, K), or its diagonal (B, K), summed
    in double precision over products in single; `samples` (B,)."""

    place: Place
    gram: Tensor
    samples: Tensor

    def add(self, which: slice, inputs: Tensor) -> None:
        """Count inputs (b, S, K)."""
        inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
        self.gram[which] += inputs.mT @ inputs if self.gram.ndim == 3 else inputs.square().sum(1)
        self.samples[which] += inputs.shape[1]

    @property
    def squares(self) -> Tensor:
        """The sum of squares of each input: (B, K)."""
        return self.gram.diagonal(dim1=1, dim2=2) if self.gram.ndim == 3 else self.gram


@dataclass
class Inputs:
    """What the weights of `candidates` (by name) are multiplied with. `whole`: their Gram matrices, not the diagonals
    alone. `unseen`: why the inputs of a weight could not be had."""

    candidates: Mapping[str, Candidate]
    whole: bool
    unseen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts: dict[str, dict[Place, Part]] = defaultdict(dict)
        self._stored = {storage_key(each.weight): name for name, each in self.candidates.items()}

    def visit(self, product: Multiplied) -> None:
        """Count the inputs of one product; for `matmul_trace.watch`."""
        if not product.with_data:
            return
        for operand in product.operands:
            name = self._name(operand)
            if name is None:
                continue
            weight = self.candidates[name].weight.detach()
            placed = None if operand.tensor is None else _same_place(operand.tensor, weight)
            found = None if placed is None else _matrices(product, operand, placed, self.candidates[name])
            if found is None:
                self.unseen[name] = f"its inputs in operator {product.operator} are not known"
                continue
            self._count(name, *found)

    def _name(self, operand: Operand) -> str | None:
        """The weight that an operand is, or is made of alone."""
        if operand.tensor is not None and (stored := self._stored.get(storage_key(operand.tensor))):
            return stored
        (name, *others) = operand.names or ("",)
        return name if name in self.candidates and not others else None

    def _count(self, name: str, place: Place, samples: Samples) -> None:
        if place not in self.parts[name]:
            B, _, K = place.size
            device = self.candidates[name].weight.device
            gram = torch.zeros((B, K, K) if self.whole else (B, K), dtype=torch.float64, device=device)
            self.parts[name][place] = Part(place, gram, torch.zeros(B, dtype=torch.int64, device=device))
        part = self.parts[name][place]
        for which, inputs in samples:
            part.add(which, inputs)
        if not part.squares.sum().isfinite():
            raise NotFinite(f"the inputs of {name} are not finite")


def _same_place(operand: Tensor, weight: Tensor) -> Tensor | None:
    """The view of `weight` that an operand is, or is a copy of (in another dtype, say); None where there is none."""
    if storage_key(operand) == storage_key(weight):
        return weight.as_strided(operand.shape, operand.stride(), operand.storage_offset())
    if operand.untyped_storage().nbytes() != weight.numel() * operand.element_size():
        return None
    view = weight.as_strided(operand.shape, operand.stride(), weight.storage_offset() + operand.storage_offset())
    return view if torch.equal(view.to(operand.dtype), operand) else None


def _matrices(
    product: Multiplied, operand: Operand, view: Tensor, candidate: Candidate
) -> tuple[Place, Samples] | None:
    """Where the matrices lie that a product multiplies with, and the inputs of each; None of products that are not
    understood, or that sum along another axis than that of the weight's groups."""
    if not operand.axes or len(product.data) != 1:
        return None
    if product.operator == "convolution":
        return _convolution(product.arguments, view) if view.shape == candidate.weight.shape else None
    data, dim = product.data[0], operand.axes[0].dim
    weight, axis = candidate.weight, candidate.axis
    K = reduction_size(tuple(weight.shape), axis)
    if view.shape[dim] != K or data.tensor.shape[data.axes[0].dim] != K or view.stride(dim) != weight.stride(axis.dim):
        return None
    if product.operator in ("_grouped_mm", "grouped_mm_fallback"):
        return _of_experts(product.arguments, view)
    return _products(data, view, dim)


def _place(view: Tensor, batched: int = 0, summed: int = 1) -> Place:
    return Place(tuple(view.shape), tuple(view.stride()), int(view.storage_offset()), batched, summed)


def _products(data: Factor, view: Tensor, dim: int) -> tuple[Place, Samples] | None:
    """A matrix or a batch of them, such as experts; one that was expanded is one matrix."""
    inputs = data.tensor.movedim(data.axes[0].dim, -1)
    rows = view.movedim(dim, -1) if view.ndim > 1 else view[None]
    batched = view.ndim > 2
    if batched and (len(rows) == 1 or rows.stride(0) == 0):
        rows, batched = rows[0], False
    if not batched:
        return _place(rows), iter([(slice(0, 1), inputs.reshape(1, -1, inputs.shape[-1]))])
    if data.place != "batch" or inputs.ndim != 3 or rows.ndim != 3 or len(inputs) != len(rows):
        return None
    return _place(rows, batched=1), iter([(slice(0, len(rows)), inputs)])


def _of_experts(arguments: Sequence[Any], view: Tensor) -> tuple[Place, Samples] | None:
    """`_grouped_mm` of tokens (S, K), sorted by expert, with weights (B, K, R): `ends` (B,) of each expert's tokens."""
    tokens, _, ends = arguments[:3]
    if not isinstance(tokens, Tensor) or not isinstance(ends, Tensor) or tokens.ndim != 2 or view.ndim != 3:
        return None
    spans = enumerate(itertools.pairwise([0, *ends.tolist()]))
    return _place(view.mT, batched=1), ((slice(i, i + 1), tokens[None, start:stop]) for i, (start, stop) in spans)


def _convolution(arguments: Sequence[Any], weight: Tensor) -> tuple[Place, Samples]:
    """A convolution of any number of dims: one matrix of all taps, columns (tap, channel), for each of its groups; or,
    where that is too wide, and where it is transposed, one for each tap."""
    data, _, _, stride, padding, dilation, transposed, added, groups = arguments[:9]
    split = weight.unflatten(0, (groups, -1))
    taps = list(range(3, split.ndim))
    kernel = weight.shape[2:]
    channels = data.unflatten(1, (groups, -1))
    numbers = ([*each] * (len(kernel) // len(each)) for each in (stride, padding, dilation, added))
    stride, padding, dilation, added = numbers
    if transposed:  # (g, C, R, *taps)
        sizes = zip(data.shape[2:], kernel, stride, padding, dilation, added, strict=True)
        met = [_met_by_taps(*each) for each in sizes]
        return _place(split.permute(*taps, 0, 2, 1), batched=len(taps) + 1), _by_tap_transposed(channels, met)
    windows = _windows(channels, kernel, stride, padding, dilation)
    if weight.shape[1] * math.prod(kernel) <= _WHOLE:
        place = _place(split.permute(0, 1, *taps, 2), batched=1, summed=len(taps) + 1)
        return place, _unfolded(windows, len(kernel))
    return _place(split.permute(*taps, 0, 1, 2), batched=len(taps) + 1), _by_tap(windows, kernel)


def _met_by_taps(size: int, taps: int, stride: int, padding: int, dilation: int, added: int) -> list[slice]:
    """The places of the input that each tap of a transposed convolution brings to the output: what it brings beyond the
    output's ends is cropped.

    >>> _met_by_taps(4, 3, 2, 1, 1, 0)  # an output of 7: the first tap begins one before it
    [slice(1, 4, None), slice(0, 4, None), slice(0, 3, None)]
    """
    last = (size - 1) * stride - 2 * padding + dilation * (taps - 1) + added
    shifts = [padding - tap * dilation for tap in range(taps)]
    return [slice(max(0, -(-s // stride)), max(0, min(size, (last + s) // stride + 1))) for s in shifts]


def _by_tap_transposed(channels: Tensor, met: Sequence[Sequence[slice]]) -> Samples:
    """One tap at a time, (N, g, C, *input) -> (g, S, C), what `met` says of each dim."""
    for i, places in enumerate(itertools.product(*met)):
        place: Any = (..., *places)
        each = channels[place].movedim(1, 0).movedim(2, -1).flatten(1, -2)
        yield slice(i * len(each), (i + 1) * len(each)), each


def _windows(
    channels: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What the kernel meets at each place of the output: (N, g, C, *input) -> (N, g, C, *output, *taps), a view of
    the padded input."""
    both = [each for pad in reversed(padding) for each in (pad, pad)]
    windows = F.pad(channels, both) if any(both) else channels
    for dim, size in enumerate(kernel):
        windows = windows.unfold(3 + dim, dilation[dim] * (size - 1) + 1, stride[dim])
    every: Any = (..., *[slice(None, None, step) for step in dilation])
    return windows[every]


def _unfolded(windows: Tensor, taps: int) -> Samples:
    """All taps as columns: (g, S, taps * C), as many images at a time as memory is meant for."""
    images = max(1, _AT_ONCE // max(1, windows[:1].numel()))
    for some in windows.split(images):
        last = some.movedim(1, 0).movedim(2, -1)  # (g, N, *output, *taps, C)
        yield slice(0, len(last)), last.flatten(-taps - 1).flatten(1, -2)


def _by_tap(windows: Tensor, kernel: Sequence[int]) -> Samples:
    """One tap at a time: (g, S, C)."""
    n = len(kernel)
    by_tap = windows.permute(*range(3 + n, 3 + 2 * n), 1, 0, *range(3, 3 + n), 2)
    for i, tap in enumerate(itertools.product(*map(range, kernel))):
        each = by_tap[tap].flatten(1, -2)
        yield slice(i * len(each), (i + 1) * len(each)), each
