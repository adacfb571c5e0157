"""Check and measure everything that runs on a GPU, in a few minutes, and write the GPU tables of docs/performance.md.

    python benchmarks/gpu.py                            # all, into build/gpu.csv and build/gpu.json
    python benchmarks/gpu.py check masks linear         # some of them
    python benchmarks/gpu.py --tables build/gpu.csv     # needs no GPU: writes the tables
    python benchmarks/gpu.py --rehearse                 # needs no GPU: every section once, tiny; its times mean nothing

Times are those of CUDA events, variants take turns, the median is reported with the 20th and 80th percentile. Before
each call memory is written that fills the GPU's cache, so that nothing is found there. The dense baseline of a product
is the fastest of torch's default library, cuBLASLt by its heuristics, and at 4096 and 8192 what torch.compile finds by
searching. Decoding is timed as CUDA graphs over copies of the weight that together exceed the cache. A ratio compares
numbers of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork import kernels, semistructured
from openwork.axis import Axis
from openwork.bench.measure import quantile, today, write_csv
from openwork.bench.models import Encoder
from openwork.deployed_gpu import GpuLinear
from openwork.masks import keep_largest as defined_mask
from openwork.metrics import pack
from openwork.ops import add_decayed, add_decayed_list, keep_largest, pack_list, prune, prune_list
from openwork.planning import as_graph

sys.path.insert(0, str(Path(__file__).parent))
import gpu_tables
import pretraining

SECTIONS = ("check", "masks", "lists", "linear", "decode", "training", "models")
PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32")
SQUARES = tuple((size, size, size) for size in (1024, 2048, 4096, 8192, 16384))
SEARCHED = SQUARES[2:4]
"""Where torch.compile searches for a dense product as well, which takes it a minute each."""
VIT_L = tuple((32 * 197, k, o) for k, o in ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)))
LLAMA_8B = tuple((4096, k, o) for k, o in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)))
DECODE = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
"""(B, K, O), and (K, O) for decoding."""


@dataclass(frozen=True)
class Row:
    """One variant. Times in microseconds. `ratio` is the baseline's median over this one's; `share` is the part of what
    bounds it: of the device's copy bandwidth for masks."""

    section: str
    shape: str
    pattern: str
    dtype: str
    impl: str
    p20_us: float
    p50_us: float
    p80_us: float
    baseline: str
    ratio: float
    share: float
    note: str
    gpu: str
    versions: str
    date: str


@dataclass(frozen=True)
class Bench:
    """Where and how long. `tiny`: a rehearsal."""

    device: torch.device
    rounds: int
    tiny: bool

    def times(self, variants: Mapping[str, Callable[[], object]], flush: bool = True) -> dict[str, list[float]]:
        """Seconds of each variant in each round; they take turns."""
        waste = torch.empty(1 if self.tiny else 2**28, dtype=torch.uint8, device=self.device)
        for each in variants.values():
            for _ in range(1 if self.tiny else 3):
                each()
        marks: dict[str, list[Any]] = {name: [] for name in variants}
        for _ in range(self.rounds):
            for name, each in variants.items():
                if flush:
                    waste.zero_()
                marks[name].append(self._timed(each))
        return {name: [stop() for stop in pairs] for name, pairs in marks.items()}

    def _timed(self, call: Callable[[], object]) -> Callable[[], float]:
        if self.device.type != "cuda":
            begun = time.perf_counter()
            call()
            passed = time.perf_counter() - begun
            return lambda: passed
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()

        def seconds() -> float:
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3

        return seconds

    def rows(
        self, section: str, shape: str, times: Mapping[str, list[float]], baselines: Sequence[str], **about: Any
    ) -> list[Row]:
        """One row for each variant against the fastest baseline. `about`: pattern, dtype, share, note, of each variant
        or of all."""
        medians = {name: statistics.median(each) for name, each in times.items()}
        best = min(baselines, key=lambda name: medians[name])
        made = []
        for name, each in times.items():
            p20, p50, p80 = (1e6 * quantile(each, q) for q in (0.2, 0.5, 0.8))
            of = {key: value.get(name, "") if isinstance(value, Mapping) else value for key, value in about.items()}
            where = (of.get("pattern") or "dense", of.get("dtype", ""), name, p20, p50, p80, best)
            found = (medians[best] / medians[name], of.get("share") or 0.0, of.get("note", ""))
            made.append(Row(section, shape, *where, *found, gpu_name(self.device), versions(), today()))
        return made


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "rehearsal on a CPU"


def versions() -> str:
    found = {"torch": torch.__version__, "openwork": ow.__version__, "CUDA": torch.version.cuda or "none"}
    for package in ("triton", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return ", ".join(f"{name} {number}" for name, number in found.items())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- check -----------------------------------------------------------------------------------------------------------


def check(bench: Bench) -> Iterator[Row]:
    """Every kernel on the device against its reference. Raises AssertionError where one differs."""
    device, done = bench.device, 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for text in ("2:4", "1:4", "3:5", "1:16", "7:32", "9:64"):
            pattern = ow.Pattern.parse(text)
            for shape, axis in (
                ((96, 640), Axis(1)),
                ((33, 130), Axis(1)),
                ((24, 40, 3, 3), Axis(1)),
                ((24, 6, 2), Axis(0, 2)),
            ):
                done += _check_masks(_ties(shape, dtype, device), pattern, axis)
            weight = _ties((24, 40, 3, 3), dtype, device).to(memory_format=torch.channels_last)
            done += _check_masks(weight, pattern, Axis(1))
    kept = [torch.rand(shape, device=device) < 0.5 for shape in ((7, 9), (100, 100))]
    bits = pack_list(kept)
    assert all(torch.equal(a, pack(b)) for a, b in zip(bits, kept, strict=True)), "pack_list"
    for dtype in (torch.bfloat16, torch.float16):
        for rows in (1, 3, 16, 64):
            for text in ("2:4", "1:8", "4:8"):
                done += _check_products(rows, text, dtype, device)
    print(f"{done} checks passed on {gpu_name(device)}; {kernels.gpu_status()}")
    yield from ()


def _ties(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Few different magnitudes, signed zeros, infinities, NaN."""
    weight = torch.randint(-3, 4, shape, device=device).to(dtype)
    some = torch.rand(shape, device=device)
    weight = torch.where(some < 0.02, -0.0, weight)
    return torch.where(some > 0.99, torch.nan, torch.where(some > 0.98, -torch.inf, weight))


def _check_masks(weight: Tensor, pattern: ow.Pattern, axis: Axis) -> int:
    keep = defined_mask(weight.abs().cpu(), pattern, axis).to(weight.device)
    where = f"{pattern} {tuple(weight.shape)} {weight.dtype}"
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    assert torch.equal(keep_largest(weight.abs(), pattern, axis), keep), f"mask {where}"
    pruned = prune(weight, pattern, axis)
    assert torch.equal(pruned.view(integers), torch.where(keep, weight, 0.0).view(integers)), f"prune {where}"
    gradient = torch.randn_like(weight)
    expected = gradient + torch.where(keep, 0.0, weight) * 0.37
    for each in prune_list([weight] * 3, pattern, [axis] * 3):
        assert torch.equal(each.view(integers), pruned.view(integers)), f"prune in a list {where}"
    lists = [gradient.clone() for _ in range(3)]
    add_decayed(gradient, weight, 0.37, pattern, axis)
    add_decayed_list(lists, [weight] * 3, 0.37, pattern, [axis] * 3)
    for each in (gradient, *lists):
        same = (each == expected) | (each.isnan() & expected.isnan())
        assert bool(same.all()), f"SR-STE term {where}: {int((~same).sum())} differ"
    return 9


def _check_products(rows: int, text: str, dtype: torch.dtype, device: torch.device) -> int:
    done = 0
    layer = sparse_linear(520, 264, text, dtype, device)
    x = torch.randn(rows, 520, device=device, dtype=dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    for kind, stored in product_kinds(layer, rows, dtype):
        made = packed(layer, text, kind, stored, x)
        if made is None:
            continue
        error = float((made(x).double() - exact).norm() / exact.norm())
        allowed = {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}.get(stored, 4 * torch.finfo(dtype).eps)
        assert error < allowed, f"{kind} {stored} {text} {rows} rows: relative error {error:.2g}, allowed {allowed:.2g}"
        done += 1
    return done


def product_kinds(layer: nn.Linear, rows: int, dtype: torch.dtype) -> list[tuple[Any, torch.dtype]]:
    """The kernels that can take a layer here, and in which dtype."""
    found: list[tuple[Any, torch.dtype]] = [
        (name, stored)
        for name, backend in semistructured.BACKENDS.items()
        for stored in (dtype, torch.int8, torch.float8_e4m3fn)
        if stored in backend.units and not semistructured.cannot(layer.weight, name, stored)
    ]
    return found + [(kind, dtype) for kind in ("gather", "expand") if rows <= 16]


def packed(layer: nn.Linear, text: str, kind: Any, stored: torch.dtype, x: Tensor) -> GpuLinear | None:
    """The layer by one kernel, its algorithm searched. None, and a line that says why, where the GPU's library has no
    product of a quantized dtype; any other failure is one."""
    try:
        made = GpuLinear(layer, ow.Pattern.parse(text), kind, stored)
        made.search(x)
        made(x)
    except RuntimeError as error:
        if stored not in semistructured.QUANTIZED:
            raise
        print(f"not here: {kind} {short(stored)}: {' '.join(str(error).split())[:120]}")
        return None
    return made


def sparse_linear(inputs: int, outputs: int, text: str, dtype: torch.dtype, device: torch.device) -> Any:
    layer = nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(prune(layer.weight, ow.Pattern.parse(text), Axis(1)))
    return layer


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_kernels(bench: Bench) -> Iterator[Row]:
    """Bandwidth of each kernel over that of a copy on this device, bytes counted once each way."""
    size = (64, 256) if bench.tiny else (8192, 8192)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(size, device=bench.device).to(dtype)
        gradient, target = torch.randn_like(weight), torch.empty_like(weight)
        for text in PATTERNS:
            pattern, bytes_ = ow.Pattern.parse(text), weight.nbytes
            variants: dict[str, Callable[[], object]] = {
                "copy": partial(target.copy_, weight),
                "prune": partial(prune, weight, pattern, Axis(1)),
                "mask": partial(keep_largest, weight, pattern, Axis(1)),
                "SR-STE term": partial(add_decayed, gradient, weight, 2e-4, pattern, Axis(1)),
                "reference": lambda p=pattern, w=weight: defined_mask(w.abs(), p, Axis(1)),  # type: ignore[misc]
            }
            moved = {
                "copy": 2 * bytes_,
                "prune": 2 * bytes_,
                "mask": bytes_ + weight.numel(),
                "SR-STE term": 3 * bytes_,
            }
            times = bench.times(variants)
            medians = {name: statistics.median(each) for name, each in times.items()}
            speed = moved["copy"] / medians["copy"]
            share = {name: moved[name] / medians[name] / speed for name in moved}
            note = {"copy": f"{speed / 1e9:.0f} GB/s"}
            about = {"pattern": text, "dtype": short(dtype), "share": share, "note": note}
            yield from bench.rows("masks", "x".join(map(str, size)), times, ["copy"], **about)


def lists(bench: Bench) -> Iterator[Row]:
    """Pruning ResNet-50's weights, and their SR-STE term: one launch for all, beside one for each."""
    shapes = resnet50_shapes()[:6] if bench.tiny else resnet50_shapes()
    weights = [torch.randn(shape, device=bench.device) for shape in shapes]
    gradients, pattern = [torch.zeros_like(w) for w in weights], ow.Pattern(2, 4)
    axes = [Axis(1)] * len(weights)

    def prunes() -> None:
        for weight in weights:
            prune(weight, pattern, Axis(1))

    def terms() -> None:
        for gradient, weight in zip(gradients, weights, strict=True):
            add_decayed(gradient, weight, 2e-4, pattern, Axis(1))

    listed = {
        "prune": (prunes, partial(prune_list, weights, pattern, axes)),
        "SR-STE term": (terms, partial(add_decayed_list, gradients, weights, 2e-4, pattern, axes)),
    }
    for what, (one_by_one, at_once) in listed.items():
        times = bench.times({"one by one": one_by_one, "list": at_once}, flush=False)
        shape = f"{what}, {len(weights)} weights"
        yield from bench.rows("lists", shape, times, ["one by one"], pattern="2:4", dtype="float32")


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The convolutions' weights that 2:4 divides: 52, and the last layer's."""
    found: list[tuple[int, ...]] = []
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            found += [(4 * width, inputs, 1, 1)] if block == 0 else []
            inputs = 4 * width
    return [*found, (1000, 2048)]


# --- products --------------------------------------------------------------------------------------------------------


def linear(bench: Bench) -> Iterator[Row]:
    """2:4 products of many rows, beside the best dense one."""
    shapes = ((64, 64, 64),) if bench.tiny else (*SQUARES, *VIT_L, *LLAMA_8B)
    for dtype in (torch.bfloat16, torch.float16):
        for B, K, O in shapes:
            layer = sparse_linear(K, O, "2:4", dtype, bench.device)
            x = torch.randn(B, K, device=bench.device, dtype=dtype)
            dense = dense_products(layer, x, search=dtype == torch.bfloat16 and (B, K, O) in SEARCHED)
            variants, about, note = dense | dense_int8(x, layer), {}, {}
            for kind, stored in product_kinds(layer, B, dtype):
                made = packed(layer, "2:4", kind, stored, x) if kind in semistructured.BACKENDS else None
                if made is not None:
                    name = kind if stored == dtype else f"{kind} {short(stored)}"
                    variants[name], about[name] = partial(made, x), "2:4"
                    algorithms = ", ".join(map(str, made.algorithms.values()))
                    note[name] = (
                        "quantizing the input included" if stored != dtype else f"algorithm {algorithms or '-'}"
                    )
            times = bench.times(variants)
            yield from bench.rows(
                "linear", f"{B},{K},{O}", times, list(dense), pattern=about, dtype=short(dtype), note=note
            )


def dense_products(layer: nn.Linear, x: Tensor, search: bool) -> dict[str, Callable[[], object]]:
    """torch's default library, cuBLASLt, and what torch.compile finds by searching."""
    found: dict[str, Callable[[], object]] = {"dense": partial(layer, x)}
    if x.is_cuda:
        found["dense cuBLASLt"] = partial(_with_cublaslt, layer, x)
    if search:
        compiled = torch.compile(copy.deepcopy(layer), mode="max-autotune-no-cudagraphs", dynamic=False)
        found["dense max-autotune"] = partial(compiled, x)
    return found


def _with_cublaslt(layer: nn.Linear, x: Tensor) -> Tensor:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return layer(x)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def dense_int8(x: Tensor, layer: nn.Linear) -> dict[str, Callable[[], object]]:
    """torch's dense int8 product alone, without quantizing: what sparse int8 must be compared with."""
    if not x.is_cuda or len(x) <= 16:
        return {}
    left = torch.randint(-127, 128, x.shape, dtype=torch.int8, device=x.device)
    right = torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8, device=x.device)
    return {"dense int8, product alone": partial(torch._int_mm, left, right.t())}


def decode(bench: Bench) -> Iterator[Row]:
    """Few rows, as CUDA graphs over copies of the weight that exceed the cache; time of one product."""
    for B in (1, 4, 16):
        for K, O in ((64, 32),) if bench.tiny else DECODE:
            for text in ("2:4", "4:8", "1:4", "1:16"):
                layer = sparse_linear(K, O, text, torch.bfloat16, bench.device)
                x = torch.randn(B, K, device=bench.device, dtype=torch.bfloat16)
                copies = 2 if bench.tiny else max(2, -(-(2**28) // layer.weight.nbytes))
                made: dict[str, list[Any]] = {"dense": [copy.deepcopy(layer) for _ in range(copies)]}
                for kind, stored in product_kinds(layer, B, torch.bfloat16):
                    if stored == torch.bfloat16:
                        # Sparse copies are smaller: as many more of them as it takes to exceed the cache too.
                        made[kind] = [GpuLinear(layer, ow.Pattern.parse(text), kind, stored) for _ in range(2 * copies)]
                        for each in made[kind]:
                            each.search(x)
                variants = {name: _all_of(each, x, bench.device) for name, each in made.items()}
                times = bench.times(variants, flush=False)
                each_one = {name: [t / len(made[name]) for t in all_] for name, all_ in times.items()}
                pattern = {name: text for name in made if name != "dense"}
                yield from bench.rows(
                    "decode", f"{B},{K},{O}", each_one, ["dense"], pattern=pattern, dtype="bfloat16", note=text
                )


def _all_of(layers: Sequence[Any], x: Tensor, device: torch.device) -> Callable[[], object]:
    def run() -> None:
        for each in layers:
            each(x)

    return as_graph(run) if device.type == "cuda" else run


# --- networks --------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> Iterator[Row]:
    """A compiled SR-STE step over the compiled dense one, bfloat16 by autocast, with the optimizer."""
    for name in ("resnet50", "gpt2"):
        steps = {
            how: training_step(bench, name, how)
            for how in pretraining.METHODS
            if name == "gpt2" or how in ("dense", "SR-STE")
        }
        times = bench.times(steps, flush=False)
        yield from bench.rows(
            "training",
            name,
            times,
            ["dense"],
            pattern={how: "2:4" for how in steps if how != "dense"},
            dtype="bfloat16",
        )


def training_step(bench: Bench, name: str, how: str) -> Callable[[], object]:
    torch.manual_seed(0)
    device = bench.device
    if name == "gpt2":
        size = pretraining.SIZES["tiny" if bench.tiny else "gpt2"]
        model = pretraining.Gpt(size, 64 if bench.tiny else 50304).to(device)
        x = torch.randint(64, (2, 16) if bench.tiny else (8, 1024), device=device)
        target = x.roll(-1, 1)
    else:
        model = resnet().to(device).to(memory_format=torch.channels_last)
        x = torch.randn(*((2, 3, 32, 32) if bench.tiny else (128, 3, 224, 224)), device=device)
        x, target = x.to(memory_format=torch.channels_last), torch.randint(1000, (len(x),), device=device)
    first_and_last = [each for each in ("conv1", "fc", "head") if hasattr(model, each)]
    optimizer = pretraining.prepared(model, how, first_and_last, lr=1e-4)
    run = model if bench.tiny else torch.compile(model)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            y = run(x)
            loss = F.cross_entropy(y.flatten(0, -2), target.flatten())
        loss.backward()
        optimizer.step()

    return step


def resnet() -> nn.Module:
    from openwork.tasks.torchvision_compat import ensure_torchvision

    return ensure_torchvision().models.resnet50()


def whole_models(bench: Bench) -> Iterator[Row]:
    """Inference of encoders of ViT-L's and BERT-large's size, deployed beside dense: eager, compiled, as graphs."""
    for name, tokens, batch in (("ViT-L", 197, 32), ("BERT-large", 512, 16)):
        made = Encoder(32, 2, 2) if bench.tiny else Encoder(1024, 16, 24)
        dense = made.to(bench.device, torch.bfloat16).eval().requires_grad_(False)
        ow.project(dense, "2:4")
        x = torch.randn(2 if bench.tiny else batch, 8 if bench.tiny else tokens, 32 if bench.tiny else 1024)
        x = x.to(bench.device, torch.bfloat16)
        variants: dict[str, Callable[[], object]] = {"dense": partial(dense, x)}
        note: dict[str, str] = {}
        if bench.device.type == "cuda":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fast = ow.deploy(dense, x, pattern="2:4")
            print(fast.deployment)
            variants["deployed"] = partial(fast, x)
            variants["dense compiled"] = partial(torch.compile(copy.deepcopy(dense)), x)
            variants["deployed, compiled"] = partial(torch.compile(copy.deepcopy(fast)), x)
            variants["dense, graph"] = as_graph(partial(dense, x))
            variants["deployed, graph"] = as_graph(partial(fast, x))
            note = {each: f"{len(fast.deployment.chosen)} layers sparse" for each in variants if "deployed" in each}
        times = bench.times(variants, flush=False)
        pattern = {each: "2:4" for each in variants if "deployed" in each}
        baselines = [each for each in variants if "dense" in each]
        yield from bench.rows(
            "models", f"{name}, batch {batch}", times, baselines, pattern=pattern, dtype="bfloat16", note=note
        )


# --- the command -----------------------------------------------------------------------------------------------------

RUNS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "check": check,
    "masks": mask_kernels,
    "lists": lists,
    "linear": linear,
    "decode": decode,
    "training": training,
    "models": whole_models,
}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", help=f"{', '.join(SECTIONS)} (default: these)")
    add("--rounds", type=int, default=30, help="times that each variant runs")
    add("--out", type=Path, default=Path("build/gpu"), help="without ending: .csv and .json are written")
    add("--tables", type=Path, metavar="CSV", help="write the tables of docs/performance.md from a run, and stop")
    add("--page", type=Path, default=gpu_tables.PAGE, help="for --tables")
    add("--rehearse", action="store_true", help="tiny, on the CPU, to try the script")
    asked = parser.parse_args(words)
    asked.what = asked.what or list(SECTIONS)
    unknown = [each for each in asked.what if each not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    asked = arguments(words)
    if asked.tables:
        gpu_tables.write(asked.tables, asked.page)
        return 0
    if not asked.rehearse and not torch.cuda.is_available():
        print(f"no CUDA GPU: torch {torch.__version__} sees none; --rehearse and --tables need none", file=sys.stderr)
        return 2
    device = torch.device("cpu" if asked.rehearse else "cuda")
    bench = Bench(device, 1 if asked.rehearse else asked.rounds, asked.rehearse)
    if not asked.rehearse and (warned := semistructured.version_warning(device)):
        print(f"warning: {warned}")
    rows: list[Row] = []
    for each in asked.what:
        with torch.inference_mode() if each not in ("training",) else torch.enable_grad():
            for row in RUNS[each](bench):
                rows.append(row)
                print(gpu_tables.line(asdict(row)), flush=True)
        write(asked.out, rows)
    return 0


def write(out: Path, rows: Sequence[Row]) -> None:
    """All rows, as CSV and as JSON. Called after each section: what was measured is not lost."""
    write_csv(out.with_suffix(".csv"), Row, rows)
    out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
