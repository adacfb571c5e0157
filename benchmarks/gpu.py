"""Check and measure everything that runs on a GPU, and write the GPU tables of docs/performance-details.md.

    python benchmarks/gpu.py                                # all, as far as nine minutes reach
    python benchmarks/gpu.py check masks lists linear --out build/gpu-1    # all, in three calls of some minutes each
    python benchmarks/gpu.py decode models --out build/gpu-2
    python benchmarks/gpu.py training --out build/gpu-3
    python benchmarks/gpu.py --tables build/gpu-1.csv build/gpu-2.csv build/gpu-3.csv    # needs no GPU: the tables
    python benchmarks/gpu.py --rehearse                     # needs no GPU: all once, tiny; its times mean nothing

Each section is a list of cases. What a case has measured is written at once. One that fails costs nothing but itself:
its traceback is printed, and the exit status is 1. After `--minutes` no other case begins; those left are printed as
skipped, and the status is 1 where checks are among them.

Times are those of CUDA events, variants take turns, the median is reported with the 20th and 80th percentile. Before
each call memory is written that fills the GPU's cache, so that nothing is found there, and then the GPU waits for a
millisecond: when it gets to the call, all of it has been launched, and no time to launch is measured. Only of lists of
weights and of whole networks launching is part of the time, and the GPU is idle before. The dense baseline of a product
is the fastest of torch's default library, cuBLASLt by its heuristics, and at 4096 and 8192 what torch.compile finds by
searching. Decoding is timed as CUDA graphs over copies of the weight that together exceed the cache. A ratio compares
numbers of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork import kernels
from openwork.bench.measure import quantile, today, write_csv
from openwork.bench.models import Encoder
from openwork.inference.layers import PackedLayer
from openwork.inference.packed_weight import bytes_held
from openwork.kernels.cuda import cusparselt
from openwork.kernels.cuda.semi_structured import SemiStructured
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask as defined_mask
from openwork.nm.quantize import quantize
from openwork.ops import foreach_decay, foreach_mask, foreach_prune
from openwork.utils.timing import ABOUT_A_MILLISECOND, as_graph

sys.path.insert(0, str(Path(__file__).parent))
import gpu_check
import gpu_tables
import pretraining
from gpu_check import NotHere, packed, product_kinds, short, sparse_linear

SECTIONS = ("check", "masks", "lists", "linear", "decode", "models", "training")
PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32")
SQUARES = tuple((size, size, size) for size in (1024, 2048, 4096, 8192, 16384))
SEARCHED = SQUARES[2:4]
"""Where torch.compile searches for a dense product as well, which takes it a minute each."""
VIT_L = tuple((32 * 197, k, o) for k, o in ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)))
LLAMA_8B = tuple((4096, k, o) for k, o in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)))
DECODE = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
"""(B, K, O), and (K, O) for decoding."""
SECONDS = 1.0
"""Of the GPU's time, after which a variant has run often enough, if at least `LEAST` times."""
LEAST = 5


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
    case: str = ""


Case = Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Bench:
    """Where, and how often at most. `tiny`: a rehearsal. `failures`: of variants, since someone emptied it."""

    device: torch.device
    rounds: int
    tiny: bool
    failures: list[str] = field(default_factory=list)

    def times(
        self, variants: Mapping[str, Callable[[], object]], flush: bool = True, launched: bool = True
    ) -> dict[str, list[float]]:
        """Seconds of each variant in each round; they take turns, and slow ones stop sooner. One that raises is left
        out, and is among the failures. `flush`: the cache is overwritten before each. `launched`: each is launched
        before the GPU gets to it."""
        waste = torch.empty(1 if self.tiny else 2**28, dtype=torch.uint8, device=self.device)
        rounds = {name: self._rounds(name, each, launched) for name, each in variants.items()}
        marks: dict[str, list[Any]] = {name: [] for name, count in rounds.items() if count}
        for turn in range(self.rounds):
            for name in marks:
                if turn < rounds[name]:
                    if flush:
                        waste.zero_()
                    marks[name].append(self._timed(variants[name], launched))
        return {name: [stop() for stop in pairs] for name, pairs in marks.items()}

    def _rounds(self, name: str, call: Callable[[], object], launched: bool) -> int:
        """How often a variant runs, which has run a few times then; 0 where it raises."""
        try:
            for _ in range(1 if self.tiny else 3):
                call()
            seconds = self._timed(call, launched)()
        except Exception as error:
            if gpu_check.lost(self.device):
                raise
            traceback.print_exc()
            self.failures.append(f"{name}: {gpu_check.summary(error)}")
            return 0
        return min(self.rounds, max(LEAST, int(SECONDS / seconds)))

    def _timed(self, call: Callable[[], object], launched: bool) -> Callable[[], float]:
        if self.device.type != "cuda":
            begun = time.perf_counter()
            call()
            passed = time.perf_counter() - begun
            return lambda: passed
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if launched:
            torch.cuda._sleep(ABOUT_A_MILLISECOND)
        else:
            torch.cuda.synchronize()
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
        best = min((name for name in baselines if name in medians), key=lambda name: medians[name])
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
    for package in ("triton", *cusparselt.PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return ", ".join(f"{name} {number}" for name, number in found.items())


def cases(
    function: Callable[..., Iterable[Row]], bench: Bench, names: Mapping[str, tuple[Any, ...]]
) -> dict[str, Case]:
    """The cases of a section: name -> a function that measures it, from name -> the rest of its arguments."""
    return {name: partial(function, bench, *rest) for name, rest in names.items()}


def check(bench: Bench) -> dict[str, Case]:
    """Every kernel on the device against its reference: gpu_check.py."""

    def checked(kind: str) -> tuple[Row, ...]:
        gpu_check.run(kind, bench.device)
        return ()

    return {kind: partial(checked, kind) for kind in gpu_check.CHECKS}


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_kernels(bench: Bench) -> dict[str, Case]:
    """Bandwidth of each kernel over that of a copy on this device, bytes counted once each way."""
    pairs = itertools.product((torch.float32, torch.bfloat16), PATTERNS)
    return cases(of_masks, bench, {f"{text} {short(dtype)}": (dtype, text) for dtype, text in pairs})


def of_masks(bench: Bench, dtype: torch.dtype, text: str) -> list[Row]:
    size = (64, 256) if bench.tiny else (8192, 8192)
    weight, pattern = torch.randn(size, device=bench.device).to(dtype), ow.Pattern.parse(text)
    gradient, target = torch.randn_like(weight), torch.empty_like(weight)
    variants: dict[str, Callable[[], object]] = {
        "copy": partial(target.copy_, weight),
        "prune": partial(foreach_prune, [weight], pattern, [Axis(1)]),
        "mask": partial(foreach_mask, [weight], pattern, [Axis(1)]),
        "SR-STE term": partial(foreach_decay, [gradient], [weight], 2e-4, pattern, [Axis(1)]),
        "reference": lambda: defined_mask(weight.abs(), pattern, Axis(1)),
    }
    once = weight.nbytes
    moved = {"copy": 2 * once, "prune": 2 * once, "mask": once + weight.numel(), "SR-STE term": 3 * once}
    times = bench.times(variants)
    speed = {name: bytes_ / statistics.median(times[name]) for name, bytes_ in moved.items() if name in times}
    share = {name: each / speed["copy"] for name, each in speed.items()}
    about = {
        "pattern": text,
        "dtype": short(dtype),
        "share": share,
        "note": {"copy": f"{speed['copy'] / 1e9:.0f} GB/s"},
    }
    return bench.rows("masks", "x".join(map(str, size)), times, ["copy"], **about)


def lists(bench: Bench) -> dict[str, Case]:
    """Pruning ResNet-50's weights, and their SR-STE term: one launch for all, beside one for each."""
    return cases(of_a_list, bench, {"prune": ("prune",), "SR-STE term": ("SR-STE term",)})


def of_a_list(bench: Bench, what: str) -> list[Row]:
    shapes = resnet50_shapes()[:6] if bench.tiny else resnet50_shapes()
    weights = [torch.randn(shape, device=bench.device) for shape in shapes]
    gradients, pattern = [torch.zeros_like(w) for w in weights], ow.Pattern(2, 4)
    axes = [Axis(1)] * len(weights)

    def prunes() -> None:
        for weight in weights:
            foreach_prune([weight], pattern, [Axis(1)])

    def terms() -> None:
        for gradient, weight in zip(gradients, weights, strict=True):
            foreach_decay([gradient], [weight], 2e-4, pattern, [Axis(1)])

    variants: dict[str, Callable[[], object]] = (
        {"one by one": prunes, "list": partial(foreach_prune, weights, pattern, axes)}
        if what == "prune"
        else {"one by one": terms, "list": partial(foreach_decay, gradients, weights, 2e-4, pattern, axes)}
    )
    times = bench.times(variants, flush=False, launched=False)
    shape = f"{what}, {len(weights)} weights"
    return bench.rows("lists", shape, times, ["one by one"], pattern="2:4", dtype="float32")


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


def linear(bench: Bench) -> dict[str, Case]:
    """2:4 products of many rows, beside the best dense one; quantized ones with bfloat16 alone."""
    shapes = ((64, 64, 64),) if bench.tiny else (*SQUARES, *VIT_L, *LLAMA_8B)
    pairs = itertools.product((torch.bfloat16, torch.float16), shapes)
    return cases(of_linear, bench, {f"{B},{K},{O} {short(dtype)}": (dtype, B, K, O) for dtype, (B, K, O) in pairs})


def of_linear(bench: Bench, dtype: torch.dtype, B: int, K: int, O: int) -> list[Row]:
    quantized = dtype == torch.bfloat16
    layer = sparse_linear(K, O, "2:4", dtype, bench.device)
    x = torch.randn(B, K, device=bench.device, dtype=dtype)
    dense = dense_products(layer, x, search=quantized and (B, K, O) in SEARCHED)
    variants, about, note = dict(dense), {}, {}
    if quantized:
        variants |= dense_int8(x, layer) | dense_fp8(x, layer)
    for kind, weight_dtype in product_kinds(layer, "2:4", B, dtype, quantized):
        if issubclass(kind, SemiStructured):
            with where_it_is_here():
                made = packed(layer, "2:4", kind, weight_dtype, x)
                name = kind.name if weight_dtype == dtype else f"{kind.name} {short(weight_dtype)}"
                algorithms = ", ".join(map(str, made.packed.algorithms.values())) or "-"
                variants[name], about[name] = partial(made, x), "2:4"
                note[name] = f"algorithm {algorithms}" if weight_dtype == dtype else "quantizing the input included"
    times = bench.times(variants)
    return bench.rows("linear", f"{B},{K},{O}", times, list(dense), pattern=about, dtype=short(dtype), note=note)


@contextlib.contextmanager
def where_it_is_here() -> Iterator[None]:
    """A variant that this machine does not have is left out, and a line says why."""
    try:
        yield
    except NotHere as reason:
        print(f"not here: {reason}", flush=True)


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


def dense_fp8(x: Tensor, layer: nn.Linear) -> dict[str, Callable[[], object]]:
    """The same for float8, with a scale for each row and each output, with its fast accumulation."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return {}
    left, left_scales = quantize(x, torch.float8_e4m3fn)
    right, right_scales = quantize(layer.weight, torch.float8_e4m3fn)
    known = (left, right.t(), left_scales[:, None].contiguous(), right_scales[None].contiguous())
    call = partial(torch._scaled_mm, *known, out_dtype=torch.bfloat16, use_fast_accum=True)
    return {"dense float8, product alone": call}


def decode(bench: Bench) -> dict[str, Case]:
    """Few rows, as CUDA graphs over copies of the weight that exceed the cache; time of one product."""
    shapes = ((64, 32),) if bench.tiny else DECODE
    all_ = itertools.product((1, 4, 16), shapes, ("2:4", "4:8", "1:4", "1:16"))
    return cases(of_decode, bench, {f"{B},{K},{O} {text}": (B, K, O, text) for B, (K, O), text in all_})


def of_decode(bench: Bench, B: int, K: int, O: int, text: str) -> list[Row]:
    layer = sparse_linear(K, O, text, torch.bfloat16, bench.device)
    x = torch.randn(B, K, device=bench.device, dtype=torch.bfloat16)
    made: dict[str, list[Any]] = {"dense": copies(layer, bench)}
    for kind, weight_dtype in product_kinds(layer, text, B, torch.bfloat16, quantized=False):
        with where_it_is_here():
            made[kind.name] = copies(packed(layer, text, kind, weight_dtype, x), bench)
    times = bench.times({name: _all_of(each, x, bench.device) for name, each in made.items()}, flush=False)
    each_one = {name: [t / len(made[name]) for t in all_] for name, all_ in times.items()}
    pattern = {name: text for name in made if name != "dense"}
    return bench.rows("decode", f"{B},{K},{O}", each_one, ["dense"], pattern=pattern, dtype="bfloat16", note=text)


def copies(layer: nn.Module, bench: Bench) -> list[nn.Module]:
    """The layer and as many copies of its tensors as it takes to exceed the cache four times: by the bytes that lie in
    memory, which are fewer in a packed layer. (`deepcopy` would pack each of those anew.)"""
    return [layer, *(_cloned(layer) for _ in range(max(2, -(-cache_to_exceed(bench) // bytes_held(layer))) - 1))]


def cache_to_exceed(bench: Bench) -> int:
    """Bytes: four times the GPU's cache, or 256 MiB where torch does not know it."""
    if bench.tiny:
        return 2**13
    known = torch.cuda.get_device_properties(bench.device)
    return 4 * getattr(known, "L2_cache_size", 2**26)


def _cloned(layer: nn.Module) -> nn.Module:
    made = type(layer).__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    for name in ("_parameters", "_buffers"):
        tensors = {key: None if each is None else each.detach().clone() for key, each in getattr(layer, name).items()}
        made.__dict__[name] = tensors
    made.__dict__["_modules"] = {key: _cloned(each) for key, each in layer._modules.items()}  # type: ignore[arg-type]
    return made


def _all_of(layers: Sequence[Any], x: Tensor, device: torch.device) -> Callable[[], object]:
    def run() -> None:
        for each in layers:
            each(x)

    return as_graph(run) if device.type == "cuda" else run


# --- networks --------------------------------------------------------------------------------------------------------


def whole_models(bench: Bench) -> dict[str, Case]:
    """Inference of encoders of ViT-L's and BERT-large's size, deployed beside dense: eager, compiled, as graphs."""
    return cases(of_model, bench, {"ViT-L": ("ViT-L", 197, 32), "BERT-large": ("BERT-large", 512, 16)})


def of_model(bench: Bench, name: str, tokens: int, batch: int) -> list[Row]:
    made = Encoder(32, 2, 2) if bench.tiny else Encoder(1024, 16, 24)
    dense = made.to(bench.device, torch.bfloat16).eval().requires_grad_(False)
    ow.project(dense, "2:4")
    x = torch.randn(2 if bench.tiny else batch, 8 if bench.tiny else tokens, 32 if bench.tiny else 1024)
    x = x.to(bench.device, torch.bfloat16)
    fast = deployed(dense, x)
    variants: dict[str, Callable[[], object]] = {"dense": partial(dense, x), "deployed": partial(fast, x)}
    models = {"deployed": fast}
    if bench.device.type == "cuda":
        variants["dense compiled"] = partial(torch.compile(copy.deepcopy(dense)), x)
        variants["deployed, compiled"] = partial(torch.compile(copy.deepcopy(fast)), x)
        models |= {"deployed, compiled": fast, "deployed, graph": deployed(dense, x, timed_as="graph")}
        variants["dense, graph"] = as_graph(partial(dense, x))
        variants["deployed, graph"] = as_graph(partial(models["deployed, graph"], x))
    times = bench.times(variants, flush=False, launched=False)
    count = {name: sum(isinstance(each, PackedLayer) for each in model.modules()) for name, model in models.items()}
    about = {
        "pattern": {name: "2:4" for name, packed_ in count.items() if packed_},
        "note": {name: f"{n} layers sparse" if n else "deploy returned the dense model" for name, n in count.items()},
    }
    baselines = [each for each in variants if each.startswith("dense")]
    return bench.rows("models", f"{name}, batch {batch}", times, baselines, dtype="bfloat16", **about)


def deployed(model: nn.Module, x: Tensor, timed_as: Any = "eager") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that dense won, which the rows say
        made = ow.deploy(model, x, pattern="2:4", timed_as=timed_as)
    print(made.deployment)
    return made


def training(bench: Bench) -> dict[str, Case]:
    """A compiled SR-STE step over the compiled dense one, bfloat16 by autocast, with the optimizer."""
    names = {"gpt2": ("gpt2", pretraining.METHODS), "resnet50": ("resnet50", ("dense", "SR-STE"))}
    return cases(of_training, bench, names)


def of_training(bench: Bench, name: str, methods: Sequence[str]) -> list[Row]:
    steps = {how: training_step(bench, name, how) for how in methods}
    times = bench.times(steps, flush=False, launched=False)
    pattern = {how: "2:4" for how in steps if how != "dense"}
    return bench.rows("training", name, times, ["dense"], pattern=pattern, dtype="bfloat16")


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
    from openwork.utils.torchvision_compat import ensure_torchvision

    try:
        torchvision = ensure_torchvision()
    except ImportError as error:
        raise NotHere(str(error)) from error
    return torchvision.models.resnet50()


# --- the command -----------------------------------------------------------------------------------------------------

RUNS: Mapping[str, Callable[[Bench], dict[str, Case]]] = {
    "check": check,
    "masks": mask_kernels,
    "lists": lists,
    "linear": linear,
    "decode": decode,
    "models": whole_models,
    "training": training,
}
WITH_GRADIENTS = ("check", "training")


@dataclass
class Run:
    """Cases one after the other, until `deadline` by `time.monotonic`; what was measured is written after each."""

    bench: Bench
    out: Path
    deadline: float
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    gone: bool = False

    def case(self, section: str, name: str, measure: Case) -> None:
        where = f"{section}: {name}"
        if self.gone or time.monotonic() >= self.deadline:
            self.skipped.append(where)
            return
        if not self.bench.tiny:
            torch.compiler.reset()  # it gives up on code that it has compiled eight times
        try:
            with torch.enable_grad() if section in WITH_GRADIENTS else torch.inference_mode():
                for row in measure():
                    self.rows.append(replace(row, case=name))
                    print(gpu_tables.line(asdict(row)), flush=True)
        except NotHere as reason:
            print(f"not here: {where}: {reason}", flush=True)
        except gpu_check.Failed as failed:
            self.failures += [f"{where}: {each}" for each in str(failed).splitlines()]
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{where}: {gpu_check.summary(error)}")
        self.failures += [f"{where}: {each}" for each in self.bench.failures]
        self.bench.failures.clear()
        self.gone = bool(self.failures) and gpu_check.lost(self.bench.device)
        if self.rows:
            write(self.out, self.rows)

    def end(self) -> int:
        """Says what failed and what was skipped. The exit status."""
        for each in self.skipped:
            print(f"skipped, {'the GPU takes nothing more' if self.gone else 'no time was left'}: {each}")
        for each in self.failures:
            print(f"FAILED: {each}")
        return int(bool(self.failures) or any(each.startswith("check:") for each in self.skipped))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", help=f"{', '.join(SECTIONS)} (default: these)")
    add("--rounds", type=int, default=30, help=f"times that each variant runs at most (less often after {SECONDS:g} s)")
    add("--minutes", type=float, default=9, help="after so many no other case begins (default: 9)")
    add("--out", type=Path, default=Path("build/gpu"), help="without ending: .csv and .json are written")
    add(
        "--tables",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="write docs/performance-details.md's tables from runs, and stop",
    )
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
    print(f"{gpu_name(device)}; {versions()}; {kernels.status('cuda')}")
    if not asked.rehearse and (warned := cusparselt.version_warning(device)):
        print(f"warning: {warned}")
    run = Run(bench, asked.out, time.monotonic() + 60 * asked.minutes)
    for section in asked.what:
        begun = time.monotonic()
        for name, measure in RUNS[section](bench).items():
            run.case(section, name, measure)
        print(f"{section} took {time.monotonic() - begun:.0f} s", flush=True)
    return run.end()


def write(out: Path, rows: Sequence[Row]) -> None:
    """All rows, as CSV and as JSON. Called after each case: what was measured is not lost."""
    write_csv(out.with_suffix(".csv"), Row, rows)
    out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
