"""Time calls in turns, so that a busy moment meets all of them: on a CPU's clock and on a GPU's own."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from openwork.utils.example import run
from openwork.utils.torch_private import freezing

ABOUT_A_MILLISECOND = 2_000_000
"""In cycles of a GPU's clock."""

MARGIN = 0.97
"""What is sparse, or another's, is chosen or named where it takes less than this share of the dense time, or ours."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 200


def fastest(variants: Mapping[str, Callable[[], object]], seconds: float = 0.3) -> dict[str, float]:
    """The time of each, in seconds, from as many rounds as it takes to tell who is the fastest, at most about so many
    seconds for each: the rule is `race`'s."""
    for each in variants.values():
        each()
    return race({name: functools.partial(_timed, each) for name, each in variants.items()}, seconds * len(variants))


def race(turns: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """The time of each, in seconds, such that who is faster does not hang on noise. `turns` measure one turn each.

    In every round each has a turn, in the other order in every other round, so that a machine that slows down favours
    none. What counts is the ratio of two times of one round: the median of these, which a busy moment does not move
    that meets both, nor one that meets either, as long as that is less than half of the rounds. Where the median lies
    is known from the ratios in order, whatever the noise is like (98 %, seven rounds or more). A variant that lies
    above the fastest for certain is slower, and has no more turns; one that lies within 3 % of it for certain is alike.

    It ends when each is one or the other; else after `seconds` or `MOST_ROUNDS`, but never before `LEAST_ROUNDS`. Then
    the median ratios decide as they are, and whoever asks lets the dense one have what is less than `MARGIN` apart."""
    end = time.perf_counter() + seconds
    times: dict[str, list[float]] = {name: [] for name in turns}
    running = list(turns)
    for number in range(1, MOST_ROUNDS + 1):
        for name in running if number % 2 else running[::-1]:
            times[name].append(turns[name]())
        first = _fastest_of({name: times[name] for name in running})
        spans = {name: _span(_ratios(times[name], times[first])) for name in running if name != first}
        running = [name for name in running if name == first or spans[name][0] <= 1]
        told = all(spans[name][1] < 1 / MARGIN for name in running if name != first)
        if number >= LEAST_ROUNDS and (told or time.perf_counter() >= end):
            break
    return in_ratio(times)


def in_ratio(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of times round by round the one of each, in seconds: its median ratio to the fastest (of those that had all
    rounds) in the rounds that both had, times the median of that one.

    >>> in_ratio({"a": [1.0, 1.0, 8.0, 8.0, 1.0], "b": [2.0, 2.0, 16.0, 1.0, 2.0]})
    {'a': 1.0, 'b': 2.0}
    """
    rounds = max(map(len, times.values()))
    first = _fastest_of({name: each for name, each in times.items() if len(each) == rounds})
    unit = statistics.median(times[first])
    return {name: unit * statistics.median(_ratios(each, times[first])) for name, each in times.items()}


def _fastest_of(times: Mapping[str, Sequence[float]]) -> str:
    return min(times, key=lambda name: statistics.median(times[name]))


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Round by round, as far as both had a turn."""
    return [a / b for a, b in zip(times, others, strict=False)]


def _span(ratios: Sequence[float]) -> tuple[float, float]:
    """Between which two of them the median of all that could come lies, with 98 % or more: each is above or below it,
    as a coin falls. Of too few nothing is known.

    >>> _span([1.0] * 6), _span([3.0, 1.0, 2.0, 4.0, 5.0, 7.0, 6.0])
    ((0.0, inf), (1.0, 7.0))
    """
    outside = math.floor((len(ratios) - 2.6 * math.sqrt(len(ratios))) / 2)
    ordered = sorted(ratios)
    return (ordered[outside], ordered[-1 - outside]) if outside >= 0 else (0.0, math.inf)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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
            times[name].append(_timed(each))
    return times


def fastest_on_gpu(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30
) -> dict[str, float]:
    """The time of each on the GPU, in seconds, by its own clock, from `rounds` whose ratios count, as in `race`. Before
    each, memory is written that fills the GPU's cache, so that weights come from memory, as between layers of a
    network; and the GPU is kept busy for about a millisecond, so that launching, which a graph or a compiler saves, is
    hidden."""
    waste = torch.empty(2**28, dtype=torch.uint8, device=device)
    for each in [*variants.values()] * 3:
        each()
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        for name in names[::-1] if number % 2 else names:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            waste.zero_()
            torch.cuda._sleep(ABOUT_A_MILLISECOND)
            start.record()
            variants[name]()
            stop.record()
            marks[name].append((start, stop))
    torch.cuda.synchronize(device)
    return in_ratio({name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in marks.items()})


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
