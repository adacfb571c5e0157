"""Time and memory of one SR-STE training step over the dense step.

    python benchmarks/training_step.py [--sizes 32 64] [--rounds 10] [--no-compile] [--json FILE]

Variants take turns within each round, so that a ratio compares neighbours in time; the median over rounds is printed
with the quartiles. `published` is the form of the authors' release, written out here from its description: argsort and
scatter in the forward of an autograd function, the decay in its backward. Memory is the peak of what torch allocates
in one step, from the profiler's allocation events, in units of one copy of the sparse weights over the dense step.
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


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


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


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return times


def row(name: str, base: str, times: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"step": name, "ms": statistics.median(times[name]) * 1e3, "over": base, "ratio": [low, middle, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "openwork": ow.__version__, "rows": []}
    print(f"ResNet-18, {PATTERN}, batch {args.batch}, {machine}, torch {torch.__version__}, {args.rounds} rounds")
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
            results["rows"].append(line)
            low, middle, high = line["ratio"]
            print(f"{size} px  {name:20} {line['ms']:8.1f} ms   {middle:.3f} [{low:.3f}, {high:.3f}] x {base}")
        peaks = {name: peak_bytes(steps[name]) for name in builds}
        for name in ("openwork", "published"):
            extra = (peaks[name] - peaks["dense"]) / weights
            results["rows"].append({"pixels": size, "step": name, "extra_copies_of_the_weights": extra})
            print(f"{size} px  {name:20} extra memory {extra:.2f} x the sparse weights ({weights / 2**20:.1f} MiB)")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
