"""Who is faster is told right on a busy machine, on one that slows down, and of two alike ones; the clock is fake."""

from __future__ import annotations

import random

import pytest

from openwork.utils import timing
from openwork.utils.timing import LEAST_ROUNDS, MARGIN, MOST_ROUNDS, fastest, in_ratio, race

DENSE, SPARSE = 0.336, 0.270


class Machine:
    """Calls that take so many seconds where nothing else runs, on a clock that they alone move on."""

    def __init__(self, patch, slower=lambda now: 1.0):
        self.now, self.slower, self.calls = 0.0, slower, []
        patch.setattr(timing.time, "perf_counter", lambda: self.now)

    def takes(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds * self.slower(self.now)

        return call

    def variants(self, **seconds):
        return {name: self.takes(name, each) for name, each in seconds.items()}


def bursts(seed, busy=1.5, idle=3.0, slower=2.5):
    """Periods in which somebody else runs: of so many seconds on average, with so many between them."""
    chance, ends = random.Random(seed), [0.0]

    def factor(now):
        while ends[-1] <= now:
            mean = busy if len(ends) % 2 else idle
            ends.append(ends[-1] + chance.expovariate(1 / mean))
        which = next(i for i, end in enumerate(ends) if end > now)
        return slower if which % 2 else 1.0

    return factor


@pytest.mark.parametrize("sparse", [SPARSE, DENSE * DENSE / SPARSE])
def test_bursts_of_noise_do_not_turn_it(monkeypatch, sparse):
    for seed in range(200):
        machine = Machine(monkeypatch, bursts(seed))
        others = {"dense, channels_last": 1.1 * DENSE, "sparse, channels_last": 1.05 * sparse}
        found = fastest(machine.variants(dense=DENSE, sparse=sparse, **others), seconds=5.0)
        assert (found["sparse"] < MARGIN * found["dense"]) == (sparse < DENSE), seed


def test_of_layers_too(monkeypatch):
    """One layer of 3 ms, on a machine that is busy for some of its calls in a row."""
    for seed in range(200):
        machine = Machine(monkeypatch, bursts(seed, busy=0.02, idle=0.03))
        found = fastest(machine.variants(torch=0.003, gemm=0.0026, gemv=0.009))
        assert found["gemm"] < MARGIN * found["torch"], seed


def test_a_machine_that_slows_down_favours_none(monkeypatch):
    """By a tenth a second: in one order alone, what comes second would look 3 to 7 % slower."""
    machine = Machine(monkeypatch, lambda now: 1.0 + 0.1 * now)
    found = fastest(machine.variants(a=0.3, b=0.3, c=0.3), seconds=5.0)
    assert all(abs(found[name] / found["a"] - 1) < 0.01 for name in "bc")
    faster = fastest(Machine(monkeypatch, lambda now: 1.0 + 0.1 * now).variants(dense=0.3, sparse=0.28), seconds=5.0)
    assert faster["sparse"] < MARGIN * faster["dense"]


def test_equal_ones_are_alike_and_known_to_be(monkeypatch):
    for seed in range(100):
        chance = random.Random(seed)
        machine = Machine(monkeypatch, lambda now, chance=chance: chance.lognormvariate(0, 0.01))
        found = fastest(machine.variants(dense=0.1, sparse=0.1), seconds=100.0)
        assert MARGIN < found["sparse"] / found["dense"] < 1 / MARGIN
        assert machine.now < 10  # of the 200 seconds that were allowed


def test_it_ends_as_soon_as_it_is_clear(monkeypatch):
    machine = Machine(monkeypatch)
    found = fastest(machine.variants(slow=0.2, fast=0.1, slowest=0.4), seconds=100.0)
    assert found == pytest.approx({"slow": 0.2, "fast": 0.1, "slowest": 0.4})
    assert machine.calls.count("fast") == 8  # one to warm up


def test_who_is_slower_has_no_more_turns(monkeypatch):
    chance = random.Random(0)
    machine = Machine(monkeypatch, lambda now: chance.lognormvariate(0, 0.1))
    found = fastest(machine.variants(a=0.1, b=0.1, far=0.5), seconds=10.0)
    assert machine.calls.count("far") < machine.calls.count("a") / 4
    assert found["far"] == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("seconds", [0.0, 2.0, 5.0])
def test_its_time_is_bounded(monkeypatch, seconds):
    """Where nothing can be told: rounds until the time is over, and three in any case."""
    chance = random.Random(0)
    machine = Machine(monkeypatch, lambda now: chance.choice([1.0, 4.0]))
    fastest(machine.variants(a=0.1, b=0.1), seconds=seconds)
    assert machine.now <= 2 * seconds + (1 + LEAST_ROUNDS) * 0.8
    assert machine.calls.count("a") >= 1 + LEAST_ROUNDS
    quick = Machine(monkeypatch, lambda now: chance.choice([1.0, 4.0]))
    fastest(quick.variants(a=1e-5, b=1e-5), seconds=seconds)
    assert quick.calls.count("a") <= 1 + MOST_ROUNDS


def test_the_reference_is_one_that_had_all_rounds():
    """What dropped out while the machine was quiet is not the fastest for that."""
    times = {"a": [1.0, 1.0, 5.0, 5.0, 5.0], "b": [1.1, 1.1, 5.5, 5.5, 5.5], "out": [2.0, 2.0]}
    assert in_ratio(times) == pytest.approx({"a": 5.0, "b": 5.5, "out": 10.0})


def test_turns_may_be_anything_that_is_timed():
    turns = {"a": iter([3.0] * 9), "b": iter([2.0] * 9)}
    assert race({name: each.__next__ for name, each in turns.items()}, 60.0) == {"a": 3.0, "b": 2.0}
