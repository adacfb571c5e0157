"""Benchmarks of single operators: masks, and products with compressed weights."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork.kernels as kernels
from openwork.bench.measure import BenchRow, Roofline, alternating, rows
from openwork.inference.layers import pack_layer
from openwork.kernels import fuses
from openwork.kernels.cpu.masks import prune_into
from openwork.kernels.cpu.onednn import prepacked_linear
from openwork.layouts import Gemm
from openwork.layouts.layout import Kind, Request, kinds_on, refusal_of
from openwork.nm.groups import Axis
from openwork.nm.masks import apply_mask, magnitude_mask
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_decay, foreach_prune

WEIGHT = (2048, 4096)
"""The weight that masks are made for."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def time_masks(peak: Roofline, patterns: Sequence[Pattern], seconds: float) -> Iterator[BenchRow]:
    """Pruning 8.4 M weights (`WEIGHT`), and the SR-STE term on their gradient, beside a copy of them and the published
    argsort form. Fresh memory costs more than either, so what allocates is compared with what allocates."""
    weight, target = torch.randn(WEIGHT), torch.empty(WEIGHT)
    shape = "x".join(map(str, WEIGHT))
    gradient = torch.randn_like(weight)
    for pattern in patterns:
        variants: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(weight),
            "clone": weight.clone,
            "prune": partial(prune_into, target, weight, pattern, Axis(1)),  # with a kernel
            "prune to new memory": partial(foreach_prune, [weight], pattern, [Axis(1)]),
            "SR-STE term": partial(foreach_decay, [gradient], [weight], 2e-4, pattern, [Axis(1)]),
            "argsort": partial(_published, weight, pattern),
        }
        if not fuses(weight):
            del variants["prune"]
        times = alternating(variants, seconds=seconds, flush=False)
        about = {name: (str(pattern), "float32") for name in variants}
        bounds = {name: peak.bound(0, passes * weight.nbytes) for name, passes in (("prune", 2), ("SR-STE term", 3))}
        fresh = {name: times.pop(name) for name in ("clone", "prune to new memory")}
        yield from rows("mask", shape, times, ["copy"], about, bounds)
        yield from rows("mask", shape, fresh, ["clone"], about, {})


def _published(weight: Tensor, pattern: Pattern) -> Tensor:
    """The form of the authors' release, written from its description: the mask by argsort and scatter."""
    groups = weight.abs().reshape(-1, pattern.m)
    lowest = torch.argsort(groups, dim=1)[:, : pattern.m - pattern.n]
    return weight * torch.ones_like(groups).scatter_(1, lowest, 0).reshape(weight.shape)


def time_linear(
    peak: Roofline,
    shapes: Sequence[tuple[int, int, int]],
    patterns: Sequence[Pattern],
    seconds: float,
    *,
    op: str = "linear",
    dtypes: Sequence[str] = tuple(DTYPES),
) -> Iterator[BenchRow]:
    """(B, K) times weights (O, K), beside the dense products that torch has, each against the fastest of those that
    round no more: float32 by torch's default and by oneDNN prepacked; bfloat16; int8 with inputs quantized within the
    time. Caches are flushed before each when B is small: then the weights come from memory, as between layers of a
    network."""
    for B, K, O in shapes:
        x, weight = torch.randn(B, K), torch.randn(O, K)
        dense = _dense(x, weight, dtypes)
        variants = {name: each for name, (_, each) in dense.items()}
        about = {name: ("dense", dtype) for name, (dtype, _) in dense.items()}
        bounds: dict[str, float] = {}
        for pattern, dtype in itertools.product(patterns, dtypes):
            for kind in _kinds(pattern, DTYPES[dtype], B):
                name, (input_dtype, speed) = f"{kind.name} {pattern} {dtype}", kind.multiplies(DTYPES[dtype])
                variants[name], size = _packed(x, weight, pattern, kind, DTYPES[dtype])
                about[name] = (str(pattern), dtype)
                moved = input_dtype.itemsize * B * (K + O)
                bounds[name] = peak.bound(2 * B * K * O * pattern.density / speed, size + moved)
        fast = kernels.vectors().dot_product
        for name, (dtype, _) in dense.items():
            size = DTYPES[dtype].itemsize * K * O + (2 if dtype == "bfloat16" else 4) * B * (K + O)
            bounds[name] = peak.bound(2 * B * K * O / (_SPEED[dtype] if fast else 1), size)
        times = alternating(variants, seconds=seconds, flush=B <= 16)
        for count, dtype in enumerate(dtypes, 1):
            baselines = [name for name, (precision, _) in dense.items() if precision in dtypes[:count]]
            mine = {name: each for name, each in times.items() if about[name][1] == dtype or name in baselines}
            found = rows(op, f"B={B} K={K} O={O}", mine, baselines, about, bounds)
            yield from (row for row in found if row.dtype == dtype)


_SPEED = {"float32": 1, "bfloat16": 2, "int8": 4}
"""How many times as many products as of float32 a processor makes whose instructions multiply pairs and quads."""


def _dense(x: Tensor, weight: Tensor, dtypes: Sequence[str]) -> dict[str, tuple[str, Callable[[], object]]]:
    """Dense products by name, with the precision of each."""
    B, found = len(x), dict[str, tuple[str, Callable[[], object]]]()
    found["torch float32"] = ("float32", partial(F.linear, x, weight))
    ordered = prepacked_linear(weight, None, B)
    if ordered is not None:
        found["oneDNN float32"] = ("float32", partial(ordered, x))
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if "bfloat16" in dtypes and (native or B <= 16):  # where the processor has no such product it takes seconds
        found["torch bfloat16"] = ("bfloat16", partial(F.linear, x.bfloat16(), weight.bfloat16()))
        ordered = prepacked_linear(weight.bfloat16(), None, B)
        if ordered is not None:
            found["oneDNN bfloat16"] = ("bfloat16", partial(ordered, x.bfloat16()))
    if "int8" in dtypes and torch.backends.quantized.engine != "none":
        scale = float(weight.abs().max()) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # to be moved to another package, some day
            whole = torch.quantize_per_tensor(weight, scale, 0, torch.qint8)
        packed_weight = torch.ops.quantized.linear_prepack(whole, None)
        found["torch int8"] = ("int8", partial(torch.ops.quantized.linear_dynamic, x, packed_weight))
    return found


def growth(
    peak: Roofline,
    shapes: Mapping[str, Sequence[tuple[int, int, int]]],
    patterns: Sequence[Pattern],
    seconds: float,
) -> Iterator[BenchRow]:
    """The same in float32 along series of shapes: `shapes` has them by what grows."""
    for what, series in shapes.items():
        yield from time_linear(peak, series, patterns, seconds, op=f"growth with {what}", dtypes=["float32"])


def _kinds(pattern: Pattern, weight_dtype: torch.dtype, rows_: int) -> list[Kind]:
    """The kernels of this CPU that are made for so many rows. A layer with bfloat16 weights is in bfloat16."""
    dtype = torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32
    request = Request(pattern, dtype, weight_dtype, torch.device("cpu"), kernels.vectors(), rows=rows_)
    return [kind for kind in kinds_on("cpu") if rows_ in kind.best_rows and not refusal_of(kind, request)]


def _packed(
    x: Tensor, weight: Tensor, pattern: Pattern, kind: Kind, weight_dtype: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """A matmul with the packed weight, and the bytes of what is packed."""
    sparse = apply_mask(weight, magnitude_mask(weight.abs(), pattern, Axis(1)))
    dtype = kind.multiplies(weight_dtype)[0]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(sparse.to(dtype), requires_grad=False)
    made = pack_layer(layer, pattern, kind, weight_dtype)
    return partial(made, x.to(dtype)), made.packed.nbytes


def layers_alternating(seconds: float, pattern: Pattern = Pattern(2, 4)) -> dict[str, float]:
    """Median seconds of a sparse layer, of a dense layer of torch, and of both in turn: what sharing a thread pool
    costs.

    The third is at most a few per cent above the sum of the first two where threads are shared well.
    """
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    sparse, _ = _packed(x, weight, pattern, Gemm, torch.float32)
    variants: dict[str, Callable[[], object]] = {
        "sparse": sparse,
        "dense": lambda: F.linear(x, weight),
        "in turn": lambda: (sparse(), F.linear(x, weight)),
    }
    times = alternating(variants, seconds=seconds, flush=False)
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}
