"""Time calls in turns, so that a busy moment meets all of them: on a CPU's clock and on a GPU's own."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from openwork.utils.example import run
from openwork.utils.torch_private import freezing

ABOUT_A_MILLISECOND = 2_000_000
"""In cycles of a GPU's clock."""


def fastest(variants: Mapping[str, Callable[[], object]], seconds: float = 0.1) -> dict[str, float]:
    """The median time of each, in seconds, of about so many seconds for each."""
    times = take_turns(variants, seconds * len(variants), least=3, most=50)
    return {name: statistics.median(each) for name, each in times.items()}


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int,
    most: int,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """The times of each, in seconds, `least` to `most` of them, in about `seconds` in all. They take turns, so that a
    busy moment meets all of them. `before` is called before each, and its time is not counted."""
    for each in variants.values():
        each()
    start = time.perf_counter()
    for each in variants.values():
        each()
    rounds = max(least, min(most, round(seconds / max(1e-6, time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, each in variants.items():
            if before is not None:
                before()
            start = time.perf_counter()
            each()
            times[name].append(time.perf_counter() - start)
    return times


def fastest_on_gpu(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30
) -> dict[str, float]:
    """The median time of each on the GPU, in seconds, by its own clock. They take turns. Before each, memory is written
    that fills the GPU's cache, so that weights come from memory, as between layers of a network; and the GPU is kept
    busy for about a millisecond, so that launching, which a graph or a compiler saves, is hidden."""
    waste = torch.empty(2**28, dtype=torch.uint8, device=device)
    for each in [*variants.values()] * 3:
        each()
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, each in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            waste.zero_()
            torch.cuda._sleep(ABOUT_A_MILLISECOND)
            start.record()
            each()
            stop.record()
            marks[name].append((start, stop))
    torch.cuda.synchronize(device)
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in marks.items()}


def finished(call: Callable[[], object]) -> Callable[[], object]:
    """The call, waited for on the GPU."""

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    return whole


def compile_frozen(model: nn.Module, example: Any) -> nn.Module:
    """A copy compiled for inference at its best: weights are constants, which dense matmuls have laid out ahead of
    time."""
    made: Any = torch.compile(copy.deepcopy(model))
    with freezing(), torch.inference_mode():
        run(made, example)
    return made


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a captured CUDA graph of the current device: what replays it, and keeps alive what it reads."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()
    return functools.partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, captured: Callable[[], object]) -> None:
    graph.replay()


def clock(device: torch.device) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]:
    return functools.partial(fastest_on_gpu, device=device) if device.type == "cuda" else fastest
