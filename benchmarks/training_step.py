"""Time and memory of one sparse training step over the dense step: SR-STE beside its published form, or all methods.

    python benchmarks/training_step.py [--sizes 32 64] [--rounds 10] [--no-compile] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --methods [--patterns 2:4 1:16] [--rounds 20] [--json FILE]

Variants take turns within each round, so that a ratio compares neighbours in time; the median over rounds is printed
with the quartiles. `published` is the form of the authors' release, written out here from its description: argsort and
scatter in the forward of an autograd function, the decay in its backward. `--methods`: every method, while its schedule
runs and once it has ended; the 20th percentile of each over that of dense with the same optimizer, in CPU time of the
process, which other processes disturb less. Memory is the peak of what torch allocates in one step over the dense step,
from the profiler's allocation events, in copies of the sparse weights (`--methods`: in bytes a sparse weight).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import openwork as ow
from openwork.utils.torchvision_compat import ensure_torchvision

PATTERN = ow.Pattern(2, 4)
DECAY = 2e-4


class Published(torch.autograd.Function):
    """Mask by sorting along the input channels, decay of the pruned weights added to the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int) -> Tensor:
        channels_last = weight.detach().permute(0, 2, 3, 1)
        groups = channels_last.abs().reshape(-1, m)
        lowest = torch.argsort(groups, dim=1)[:, : m - n]
        mask = torch.ones_like(groups).scatter_(1, lowest, 0)
        mask = mask.reshape(channels_last.shape).permute(0, 3, 1, 2)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad + DECAY * (1 - mask) * weight, None, None


class PublishedForm(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return Published.apply(weight, PATTERN.n, PATTERN.m)


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return ensure_torchvision().models.resnet18(num_classes=10)


def dense() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = resnet18()
    return model, sgd(model)


def openwork() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = resnet18()
    ow.sparsify(model, PATTERN, ow.SRSTE(DECAY), exclude=["fc"])
    optimizer = sgd(model)
    ow.attach(optimizer, model)
    return model, optimizer


def published() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = resnet18()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and module.in_channels % PATTERN.m == 0:
            parametrize.register_parametrization(module, "weight", PublishedForm())
    return model, sgd(model)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-5)


def training_step(build: Callable[[], Any], size: int, batch: int, compiled: bool) -> Callable[[], None]:
    model, optimizer = build()
    run = torch.compile(model) if compiled else model
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(images), labels).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that torch had allocated at once in a step, over what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, clock))
    return times


def row(name: str, base: str, times: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"step": name, "ms": statistics.median(times[name]) * 1e3, "over": base, "ratio": [low, middle, high]}


LONG = 10**6  # steps of a schedule that runs as long as this does
NOW, LATER = "while its schedule runs", "once it has ended"
# What is measured of each method: when, with what, and whether with Adam, as STEP wants it.
ALL: list[tuple[str, str, Any, bool]] = [
    ("STE", "", ow.STE(), False),
    ("SR-STE", "", ow.SRSTE(DECAY), False),
    ("SR-STE, decoupled", "", ow.SRSTE(DECAY, decoupled=True), True),
    ("S-STE", "", ow.SSTE(), False),
    ("STEP", NOW, ow.STEP(LONG), True),
    ("STEP", LATER, ow.STEP(1), True),
    ("MdGf", NOW, ow.MdGf(LONG), False),
    ("MdGf", LATER, ow.MdGf(1), False),
    ("SdGf", NOW, ow.SdGf(LONG), False),
    ("SdGf", LATER, ow.SdGf(1), False),
    ("SR-STE, ramp", NOW, ow.SRSTE(DECAY, schedule=ow.Ramp(LONG)), False),
    ("MaxQ", NOW, ow.MaxQ(LONG, DECAY), False),
    ("MaxQ", LATER, ow.MaxQ(1, DECAY), False),
    ("transposable", "39 steps of 40", ow.TransposableSRSTE(DECAY, LONG), False),
    ("transposable", "that chooses masks", ow.TransposableSRSTE(DECAY, 1), False),
    ("ASP", "", ow.ASP(), False),
    ("Dense", "", ow.Dense(), False),
]


def by_method(method: Any, pattern: ow.Pattern, adam: bool) -> Callable[[], tuple[nn.Module, torch.optim.Optimizer]]:
    """A model and its optimizer, one step trained; dense without a method."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = resnet18()
        if method:
            ow.sparsify(model, pattern, method, exclude=["fc"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if adam else sgd(model)
        if method:
            ow.attach(optimizer, model)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        return model, optimizer

    return build


def compare_methods(pattern: ow.Pattern, size: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row of each: the 20th percentile of its times over that of dense with its optimizer, and bytes of a weight."""
    builds = {("dense", str(adam)): by_method(None, pattern, adam) for adam in (False, True)}
    builds |= {(name, when): by_method(method, pattern, adam) for name, when, method, adam in ALL}
    steps = {" ".join(key): training_step(build, size, batch, False) for key, build in builds.items()}
    measured = measure(steps, rounds, time.process_time)
    times = {name: statistics.quantiles(found, n=5)[0] for name, found in measured.items()}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    weights = sum(r.weights for r in ow.sparsify(resnet18(), pattern, exclude=["fc"]).rows if r.pattern)
    rows = []
    for name, when, _, adam in ALL:
        this, base = f"{name} {when}", f"dense {adam}"
        ratio, extra = times[this] / times[base], (peaks[this] - peaks[base]) / weights
        rows.append({"pattern": str(pattern), "method": name, "when": when, "time": ratio, "bytes_a_weight": extra})
        print(f"{pattern}  {name:18} {when:24} {ratio:.3f} x dense   {extra:+.2f} bytes a weight at the peak of a step")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--methods", action="store_true", help="all methods instead of SR-STE and its published form")
    parser.add_argument("--patterns", type=ow.Pattern.parse, nargs="+", default=[PATTERN], help="with --methods")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "openwork": ow.__version__, "rows": []}
    pattern = "" if args.methods else f"{PATTERN}, "
    print(f"ResNet-18, {pattern}batch {args.batch}, {machine}, torch {torch.__version__}, {args.rounds} rounds")
    if args.methods:
        for pattern in args.patterns:
            results["rows"] += compare_methods(pattern, args.sizes[0], args.batch, args.rounds)
    else:
        compare_forms(args, results["rows"])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def compare_forms(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """SR-STE as it is here and as it was published, eager and compiled."""
    weights = sum(r.weights * 4 for r in ow.sparsify(resnet18(), PATTERN, exclude=["fc"]).rows if r.pattern)
    for size in args.sizes:
        builds = {"dense": dense, "openwork": openwork, "published": published}
        steps = {name: training_step(build, size, args.batch, False) for name, build in builds.items()}
        if not args.no_compile:
            steps |= {f"{name} compiled": training_step(b, size, args.batch, True) for name, b in builds.items()}
        times = measure(steps, args.rounds)
        for name in steps:
            base = "dense compiled" if name.endswith("compiled") else "dense"
            line = {"pixels": size, **row(name, base, times)}
            rows.append(line)
            low, middle, high = line["ratio"]
            print(f"{size} px  {name:20} {line['ms']:8.1f} ms   {middle:.3f} [{low:.3f}, {high:.3f}] x {base}")
        peaks = {name: peak_bytes(steps[name]) for name in builds}
        for name in ("openwork", "published"):
            extra = (peaks[name] - peaks["dense"]) / weights
            rows.append({"pixels": size, "step": name, "extra_copies_of_the_weights": extra})
            print(f"{size} px  {name:20} extra memory {extra:.2f} x the sparse weights ({weights / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
