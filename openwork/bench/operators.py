"""Benchmarks of single operators: masks, and products with compressed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from openwork.axis import Axis
from openwork.bench.measure import Machine, Row, alternating, rows
from openwork.deployed import kinds_for, packed
from openwork.kernels.masks import in_one_pass, prune_into
from openwork.masks import keep_largest, prune
from openwork.onednn import prepacked_linear
from openwork.ops import add_decayed
from openwork.ops import prune as prune_in_one_pass
from openwork.ops.products import panel_numbers, rows_numbers
from openwork.pattern import Pattern

WEIGHT = (2048, 4096)
"""The weight that masks are made for."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def masks(machine: Machine, patterns: Sequence[Pattern], seconds: float) -> Iterator[Row]:
    """Pruning 8.4 M weights (`WEIGHT`), and the SR-STE term on their gradient, beside a copy of them and the published
    argsort form. Fresh memory costs more than either, so what allocates is compared with what allocates."""
    weight, target = torch.randn(WEIGHT), torch.empty(WEIGHT)
    shape = "x".join(map(str, WEIGHT))
    gradient = torch.randn_like(weight)
    for pattern in patterns:
        variants: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(weight),
            "clone": weight.clone,
            "prune": partial(prune_into, target, weight, pattern.n, pattern.m, 1, 1, False),  # with a kernel
            "prune to new memory": partial(prune_in_one_pass, weight, pattern, Axis(1)),
            "SR-STE term": partial(add_decayed, gradient, weight, 2e-4, pattern, Axis(1)),
            "argsort": partial(_published, weight, pattern),
        }
        if not in_one_pass(weight):
            del variants["prune"]
        times = alternating(variants, seconds=seconds, flush=False)
        about = {name: (str(pattern), "float32") for name in variants}
        bounds = {name: machine.bound(0, passes * weight.nbytes) for name, passes in (("prune", 2), ("SR-STE term", 3))}
        fresh = {name: times.pop(name) for name in ("clone", "prune to new memory")}
        yield from rows("mask", shape, times, ["copy"], about, bounds)
        yield from rows("mask", shape, fresh, ["clone"], about, {})


def _published(weight: Tensor, pattern: Pattern) -> Tensor:
    """The form of the authors' release, written from its description: the mask by argsort and scatter."""
    groups = weight.abs().reshape(-1, pattern.m)
    lowest = torch.argsort(groups, dim=1)[:, : pattern.m - pattern.n]
    return weight * torch.ones_like(groups).scatter_(1, lowest, 0).reshape(weight.shape)


def linear(
    machine: Machine,
    shapes: Sequence[tuple[int, int, int]],
    patterns: Sequence[Pattern],
    seconds: float,
    *,
    op: str = "linear",
    dtypes: Sequence[str] = tuple(DTYPES),
) -> Iterator[Row]:
    """(B, K) times weights (O, K), beside torch's default and oneDNN's prepacked product in float32, and torch's
    bfloat16. Caches are flushed before each when B is small: then the weights come from memory, as between layers of a
    network."""
    for B, K, O in shapes:
        x, weight = torch.randn(B, K), torch.randn(O, K)
        dense: dict[str, Callable[[], object]] = {"torch float32": partial(F.linear, x, weight)}
        ordered = prepacked_linear(weight, None, B)
        if ordered is not None:
            dense["oneDNN float32"] = partial(ordered, x)
        if B <= 16:  # where torch has no fast bfloat16 product it takes seconds for more
            dense["torch bfloat16"] = partial(F.linear, x.bfloat16(), weight.bfloat16())
        variants, about, bounds = dict(dense), {"torch bfloat16": ("dense", "bfloat16")}, {}
        for pattern in patterns:
            for dtype in dtypes:
                for kind in kinds_for(weight, pattern):
                    if B > 16 if kind == "rows" else B < 4:
                        continue
                    name = f"{kind} {pattern} {dtype}"
                    variants[name], size = _product(x, weight, pattern, kind, DTYPES[dtype])
                    about[name] = (str(pattern), dtype)
                    bounds[name] = machine.bound(2 * B * K * O * pattern.density, size + x.nbytes + 4 * B * O)
        for name in dense:
            bounds[name] = machine.bound(
                2 * B * K * O, weight.nbytes / (2 if "bf" in name else 1) + x.nbytes + 4 * B * O
            )
        times = alternating(variants, seconds=seconds, flush=B <= 16)
        yield from rows(op, f"B={B} K={K} O={O}", times, dense, about, bounds)


def growth(
    machine: Machine,
    shapes: Mapping[str, Sequence[tuple[int, int, int]]],
    patterns: Sequence[Pattern],
    seconds: float,
) -> Iterator[Row]:
    """The same in float32 along series of shapes: `shapes` has them by what grows."""
    for what, series in shapes.items():
        yield from linear(machine, series, patterns, seconds, op=f"growth with {what}", dtypes=["float32"])


def _product(
    x: Tensor, weight: Tensor, pattern: Pattern, kind: str, stored: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """A product with the packed weight, and the bytes of what is packed."""
    sparse = prune(weight, keep_largest(weight.abs(), pattern, Axis(1)))
    if kind == "rows":
        made = packed(sparse, pattern, "rows", stored)
        operator, numbers, positions = torch.ops.openwork.rows_linear.default, rows_numbers(made), made.words  # type: ignore[arg-type, union-attr]
    else:
        made = packed(sparse, pattern, "panel", stored)
        operator, numbers, positions = torch.ops.openwork.panel_linear.default, panel_numbers(made), made.positions  # type: ignore[arg-type, union-attr]
    size = made.values.nbytes + positions.nbytes
    return lambda: operator(x, made.values, positions, made.scales, None, numbers, False), size


def layers_alternating(seconds: float, pattern: Pattern = Pattern(2, 4)) -> dict[str, float]:
    """Median seconds of a sparse layer, of a dense layer of torch, and of both in turn: what sharing a thread pool
    costs.

    The third is at most a few per cent above the sum of the first two where threads are shared well.
    """
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    sparse, _ = _product(x, weight, pattern, "panel", torch.float32)
    variants: dict[str, Callable[[], object]] = {
        "sparse": sparse,
        "dense": lambda: F.linear(x, weight),
        "in turn": lambda: (sparse(), F.linear(x, weight)),
    }
    times = alternating(variants, seconds=seconds, flush=False)
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}
