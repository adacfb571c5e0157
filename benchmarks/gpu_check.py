"""The checks of benchmarks/gpu.py: every kernel on a device against its reference, and what is built on them: packed
layers as they are used, copied, captured and compiled, and accelerated training.

    python benchmarks/gpu.py check
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import openwork as ow
import openwork.kernels as kernels
from openwork.inference.choose import Packed
from openwork.inference.geometry import form_of
from openwork.inference.layers import pack_layer
from openwork.kernels.cuda import cusparselt
from openwork.layouts.layout import Kind, Request, kinds_on
from openwork.nm.groups import Axis
from openwork.nm.mask_stats import pack, sad
from openwork.nm.masks import magnitude_mask as defined_mask
from openwork.nm.quantize import QUANTIZED
from openwork.nm.transposable import transposable_mask as defined_transposable
from openwork.ops import (
    foreach_decay,
    foreach_mask,
    foreach_pack,
    foreach_packed_sad,
    foreach_prune,
    foreach_transposable_mask,
)
from openwork.utils.timing import as_graph

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
PATTERNS = tuple(map(ow.Pattern.parse, ("2:4", "1:4", "3:5", "1:16", "7:32", "9:64")))
WEIGHTS = (((96, 640), Axis(1)), ((33, 130), Axis(1)), ((24, 40, 3, 3), Axis(1)), ((24, 6, 2), Axis(0, 2)))
RATE = 0.37


class NotHere(Exception):
    """Something that this machine, or what is installed on it, does not have. No failure."""


class Failed(Exception):
    """Checks that failed, a line for each."""


@dataclass
class Tally:
    """What became of the checks of one kind."""

    device: torch.device
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def check(self, what: str) -> Iterator[None]:
        """What runs inside is one check, failed where it raises. Checks after it run all the same, unless the GPU takes
        nothing more."""
        try:
            yield
        except NotHere as reason:
            self.absent.add(str(reason))
        except Exception as error:
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            self.failures.append(f"{what}: {summary(error)}")
            if lost(self.device):
                self.end()
        else:
            self.passed += 1

    def end(self) -> None:
        """Raises Failed where something has."""
        if self.failures:
            raise Failed("\n".join(self.failures))


def run(kind: str, device: torch.device) -> None:
    """All checks of a kind, and a line of how many passed. Raises Failed, of all that failed."""
    torch.manual_seed(0)
    tally = Tally(device)
    try:
        CHECKS[kind](tally)
    finally:
        failed = f", {len(tally.failures)} FAILED" if tally.failures else ""
        print(f"{kind}: {tally.passed} checks passed{failed}", flush=True)
        for each in sorted(tally.absent):
            print(f"  not here: {each}")
    tally.end()


def lost(device: torch.device) -> bool:
    """Whether the GPU takes nothing more in this process, as after an access to memory that is not its own."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def summary(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


# --- masks -----------------------------------------------------------------------------------------------------------


def masks(tally: Tally) -> None:
    """Masks, pruned weights and SR-STE terms of one weight, bit by bit."""
    for dtype, pattern in itertools.product(FLOATS, PATTERNS):
        weights = [(ties(shape, dtype, tally.device), axis) for shape, axis in WEIGHTS]
        weights.append((ties((24, 40, 3, 3), dtype, tally.device).to(memory_format=torch.channels_last), Axis(1)))
        for weight, axis in weights:
            where = f"{pattern} {tuple(weight.shape)} {short(dtype)}"
            keep, pruned, gradient, added = defined(weight, pattern, axis)
            with tally.check(f"mask {where}"):
                same(foreach_mask([weight.abs()], pattern, [axis])[0], keep)
            with tally.check(f"prune {where}"):
                same_bits(foreach_prune([weight], pattern, [axis])[0], pruned)
            with tally.check(f"SR-STE term {where}"):
                foreach_decay([gradient], [weight], RATE, pattern, [axis])
                same(gradient, added)


def lists(tally: Tally) -> None:
    """The same of lists, of weights alike and of different shapes and axes."""
    unlike = [shape_axis for shape_axis in WEIGHTS for _ in range(2)]
    for dtype, pattern, cases in itertools.product(FLOATS, PATTERNS, ([WEIGHTS[0]] * 3, unlike)):
        axes = [axis for _, axis in cases]
        weights = [ties(shape, dtype, tally.device) for shape, _ in cases]
        of_each = [defined(weight, pattern, axis) for weight, axis in zip(weights, axes, strict=True)]
        keeps, pruned, gradients, added = zip(*of_each, strict=True)
        where = f"{pattern} of {len(cases)} weights in {short(dtype)}"
        with tally.check(f"masks in a list {where}"):
            each_one(same, foreach_mask([w.abs() for w in weights], pattern, axes), keeps)
        with tally.check(f"prune in a list {where}"):
            each_one(same_bits, foreach_prune(weights, pattern, axes), pruned)
        with tally.check(f"SR-STE terms in a list {where}"):
            foreach_decay(gradients, weights, RATE, pattern, axes)
            each_one(same, gradients, added)


def transposable(tally: Tally) -> None:
    """Transposable masks, also where tiles have to be filled up."""
    shapes = ((64, 48), (260, 516), (10, 14), (24, 40, 3, 3))
    for dtype, text, shape in itertools.product(FLOATS, ("2:4", "1:4"), shapes):
        some = {"ties": ties(shape, dtype, tally.device), "normal": torch.randn(shape, device=tally.device).to(dtype)}
        for name, weight in some.items():
            with tally.check(f"transposable {text} {shape} {short(dtype)}, {name}"):
                pattern = ow.Pattern.parse(text)
                (mask,) = foreach_transposable_mask([weight.abs()], pattern, [Axis(1)], [Axis(0)])
                same(mask, defined_transposable(weight.abs().cpu(), pattern, Axis(1), Axis(0)))


def bits(tally: Tally) -> None:
    """Packed masks and how far they are from one another."""
    shapes = ((7, 9), (100, 100), (1,), (33, 3, 3, 3), (1024, 1025))
    first, second = ([torch.rand(shape, device=tally.device) < 0.5 for shape in shapes] for _ in range(2))
    with tally.check("foreach_pack"):
        each_one(same, foreach_pack(first), [pack(each) for each in first])
    with tally.check("foreach_packed_sad"):
        found = foreach_packed_sad(foreach_pack(first), foreach_pack(second))
        expected = [sad(a, b) for a, b in zip(first, second, strict=True)]
        assert found == expected, f"{found}; expected {expected}"


def ties(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Few different magnitudes, signed zeros, infinities, NaN."""
    weight = torch.randint(-3, 4, shape, device=device).to(dtype)
    some = torch.rand(shape, device=device)
    weight = torch.where(some < 0.02, -0.0, weight)
    return torch.where(some > 0.99, torch.nan, torch.where(some > 0.98, -torch.inf, weight))


def defined(weight: Tensor, pattern: ow.Pattern, axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the reference: the mask, the pruned weight, a gradient, and that gradient with SR-STE's term added."""
    keep = defined_mask(weight.abs().cpu(), pattern, axis).to(weight.device)
    gradient = torch.randn_like(weight)
    return keep, torch.where(keep, weight, 0.0), gradient, gradient + torch.where(keep, 0.0, weight) * RATE


def same(found: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless all numbers are equal, NaN being equal to NaN."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}; expected {tuple(expected.shape)}"
    expected = expected.to(found.device)
    differ = int(((found != expected) & ~(found.isnan() & expected.isnan())).sum())
    assert not differ, f"{differ} of {found.numel()} differ"


def same_bits(found: Tensor, expected: Tensor) -> None:
    integers = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert found.dtype == expected.dtype, f"{found.dtype}; expected {expected.dtype}"
    same(found.view(integers), expected.view(integers))


def each_one(compare: Callable[[Tensor, Tensor], None], found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        compare(a, b)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- layers ----------------------------------------------------------------------------------------------------------


def sparse(layer: Any, text: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The layer pruned, ready for inference, with biases that no other layer has."""
    layer = layer.to(device, dtype).eval().requires_grad_(False)
    layer.weight.copy_(foreach_prune([layer.weight], ow.Pattern.parse(text), [Axis(1)])[0])
    layer.bias.normal_()
    return layer


def sparse_linear(inputs: int, outputs: int, text: str, dtype: torch.dtype, device: torch.device) -> Any:
    return sparse(nn.Linear(inputs, outputs, device=device, dtype=dtype), text, dtype, device)


def product_kinds(
    layer: Any, text: str, rows: int, dtype: torch.dtype, quantized: bool = True
) -> list[tuple[Kind, torch.dtype]]:
    """The kernels of a GPU that can take a layer here, and in which dtype."""
    pattern, device = ow.Pattern.parse(text), layer.weight.device
    conv, vectors = form_of(layer, pattern).conv, kernels.vectors()
    dtypes = (dtype, *QUANTIZED) if quantized else (dtype,)
    requests = [Request(pattern, dtype, each, device, vectors, conv, rows) for each in dtypes]
    return [(kind, each.weight_dtype) for kind in kinds_on("cuda") for each in requests if not kind.refusal(each)]


def missing(device: torch.device) -> set[str]:
    """Which libraries have no products here, and why."""
    reasons = {name: each.missing(device) for name, each in cusparselt.BACKENDS.items()}
    return {f"{name}: {reason}" for name, reason in reasons.items() if reason}


UNSUPPORTED = ("not supported", "architecture mismatch", "not implemented")


def packed(layer: nn.Module, text: str, kind: Kind, weight_dtype: torch.dtype, x: Tensor) -> Packed:
    """The layer by one kernel, its algorithm searched. Raises NotHere where the GPU's library says that it has no
    product of a quantized dtype; any other error is one."""
    try:
        made = pack_layer(layer, ow.Pattern.parse(text), kind, weight_dtype)
        made.search(x)
        made(x)
    except RuntimeError as error:
        if weight_dtype in QUANTIZED and any(each in str(error).lower() for each in UNSUPPORTED):
            raise NotHere(f"{kind.name} {short(weight_dtype)}: {summary(error)[:160]}") from error
        raise
    return made


def exact(layer: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(layer).double()(x.double())


def close(found: Tensor, expected: Tensor, weight_dtype: torch.dtype) -> None:
    """Raises AssertionError where a product is further from the exact one than rounding explains."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}; expected {tuple(expected.shape)}"
    error = float((found.double() - expected).norm() / expected.norm())
    allowed = {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}.get(weight_dtype) or 4 * torch.finfo(weight_dtype).eps
    assert error < allowed, f"relative error {error:.2g}, allowed {allowed:.2g}"  # not of NaN


def every_kind(
    tally: Tally, name: str, many_rows: Sequence[int] = (16, 64)
) -> Iterator[tuple[Any, Tensor, Kind, torch.dtype, str]]:
    """A linear layer whose sizes need filling up, an input, and each kernel that takes them: few rows and many."""
    for rows in many_rows:
        layer = sparse_linear(520, 264, "2:4", torch.bfloat16, tally.device)
        x = torch.randn(rows, 520, device=tally.device, dtype=torch.bfloat16)
        for kind, weight_dtype in product_kinds(layer, "2:4", rows, torch.bfloat16):
            yield layer, x, kind, weight_dtype, f"{name}, {kind.name} {short(weight_dtype)}, {rows} rows"


def products(tally: Tally) -> None:
    """Linear layers: few rows and many, sizes that fit the kernels and sizes that are filled up."""
    tally.absent |= missing(tally.device)
    sizes = ((512, 256), (520, 264), (70, 40))
    for dtype, rows, (inputs, outputs), text in itertools.product(
        HALVES, (1, 3, 16, 64, 200), sizes, ("2:4", "1:8", "4:8")
    ):
        layer = sparse_linear(inputs, outputs, text, dtype, tally.device)
        x = torch.randn(rows, inputs, device=tally.device, dtype=dtype)
        for kind, weight_dtype in product_kinds(layer, text, rows, dtype):
            with tally.check(
                f"{kind.name} {short(weight_dtype)} {text}, {rows} x {inputs} to {outputs}, {short(dtype)}"
            ):
                close(packed(layer, text, kind, weight_dtype, x)(x), exact(layer, x), weight_dtype)


def convolutions(tally: Tally) -> None:
    """Kernels of one pixel and of nine, in both memory formats."""
    tally.absent |= missing(tally.device)
    kernels = ({"kernel_size": 1}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 3, "padding": 1})
    for dtype, options, inputs in itertools.product(HALVES, (*kernels, {"kernel_size": 3, "stride": 2}), (64, 38)):
        conv = sparse(nn.Conv2d(inputs, 40, **options), "2:4", dtype, tally.device)
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, inputs, 15, 15, device=tally.device).to(dtype, memory_format=form)
            for kind, weight_dtype in product_kinds(conv, "2:4", 2 * 15 * 15, dtype):
                with tally.check(f"{kind.name} {short(weight_dtype)} {conv}, {short(form)}, {short(dtype)}"):
                    close(packed(conv, "2:4", kind, weight_dtype, x)(x), exact(conv, x), weight_dtype)


def turns(tally: Tally) -> None:
    """Two layers of one shape, used by turns: what a library remembers of a shape must not be the first one's."""
    for layer, x, kind, weight_dtype, where in every_kind(tally, "turns"):
        with tally.check(where):
            other = sparse_linear(520, 264, "2:4", torch.bfloat16, tally.device)
            made = [(packed(each, "2:4", kind, weight_dtype, x), exact(each, x)) for each in (layer, other)]
            for one, expected in made * 3:
                close(one(x), expected, weight_dtype)


def states(tally: Tally) -> None:
    """State dicts loaded into another packed layer, and copies."""
    for layer, x, kind, weight_dtype, where in every_kind(tally, "state"):
        with tally.check(where):
            made = packed(layer, "2:4", kind, weight_dtype, x)
            other = packed(sparse_linear(520, 264, "2:4", torch.bfloat16, tally.device), "2:4", kind, weight_dtype, x)
            other.load_state_dict(made.state_dict())
            close(other(x), exact(layer, x), weight_dtype)
            copied = copy.deepcopy(made)
            same(copied.weight, made.weight)
            close(copied(x), exact(layer, x), weight_dtype)


def graphs(tally: Tally) -> None:
    """Products in a CUDA graph, replayed on another input."""
    for layer, x, kind, weight_dtype, where in every_kind(tally, "graph"):
        with tally.check(where):
            if not x.is_cuda:
                raise NotHere("CUDA graphs: this is a CPU")
            made, held = packed(layer, "2:4", kind, weight_dtype, x), [x]
            replay = as_graph(lambda: held.__setitem__(0, made(x)))  # noqa: B023 - replayed before the loop goes on
            x.normal_()
            replay()
            close(held[0], exact(layer, x), weight_dtype)


def compiled(tally: Tally) -> None:
    """Products under torch.compile, and a weight that is pruned there."""
    backend = "inductor" if tally.device.type == "cuda" else "aot_eager"
    compiled_ = partial(torch.compile, fullgraph=True, backend=backend)
    for layer, x, kind, weight_dtype, where in every_kind(tally, "compiled", (16,)):
        with tally.check(where):
            torch.compiler.reset()  # it gives up on code that it has compiled eight times
            close(compiled_(packed(layer, "2:4", kind, weight_dtype, x))(x), exact(layer, x), weight_dtype)
    with tally.check("compiled prune"):
        weight = ties((96, 640), torch.bfloat16, tally.device)
        doubled = compiled_(lambda w: foreach_prune([w], ow.Pattern(2, 4), [Axis(1)])[0] * 2)(weight)
        same(doubled, defined(weight, ow.Pattern(2, 4), Axis(1))[1] * 2)


def accelerated(tally: Tally) -> None:
    """Outputs and gradients of a step on sparse tensor cores beside the dense ones, in bfloat16 by autocast."""
    reason = cusparselt.BACKENDS["cusparselt"].missing(tally.device)
    for rows in (64, 200, 30):
        with tally.check(f"accelerate, {rows} rows"):
            if reason:
                raise NotHere(f"ow.accelerate: {reason}")
            plain = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 48)).to(tally.device)
            ow.sparsify(plain, "2:4", ow.TransposableSRSTE())
            fast = copy.deepcopy(plain)
            found = ow.accelerate(fast)
            assert len(found.sparse) == 2, str(found)
            x = torch.randn(rows, 64, device=tally.device)
            for (name, a), b in zip(step_of(fast, x).items(), step_of(plain, x).values(), strict=True):
                error = float((a - b).norm() / b.norm())
                assert error < 0.03, f"{name}: relative error {error:.2g}, allowed 0.03"


def step_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, in double precision."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    gradients = {name: each.grad for name, each in [("input", x), *model.named_parameters()]}
    return {"output": y.detach().double()} | {f"gradient of {k}": v.double() for k, v in gradients.items()}


CHECKS: Mapping[str, Callable[[Tally], None]] = {
    "masks": masks,
    "lists": lists,
    "transposable": transposable,
    "bits": bits,
    "products": products,
    "convolutions": convolutions,
    "turns": turns,
    "states": states,
    "graphs": graphs,
    "compiled": compiled,
    "accelerated": accelerated,
}
