"""Budgets: the choice against exhaustive search, and costs against their definitions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.pruning import allocate
from openwork.pruning.allocate import Choice, choose


def choices(seed: int) -> dict[str, list[Choice]]:
    draw = random.Random(seed)
    found = {}
    for layer in range(5):
        scale, cost = draw.uniform(0.1, 3), draw.uniform(1, 9)
        errors = sorted(draw.uniform(0, scale) for _ in range(3))
        options = zip((ow.Pattern(2, 4), ow.Pattern(1, 4), ow.Pattern(1, 8)), (0.5, 0.25, 0.125), errors, strict=True)
        found[f"layer{layer}"] = [Choice(None, cost, 0.0), *(Choice(p, cost * share, e) for p, share, e in options)]
    return found


def spent(chosen: dict[str, Choice]) -> tuple[float, float]:
    return sum(each.cost for each in chosen.values()), sum(each.error for each in chosen.values())


@pytest.mark.parametrize("budget", [1.0, 0.7, 0.5, 0.3, 0.15])
def test_the_choice_is_near_the_best_of_all(budget: float) -> None:
    ratios = []
    for seed in range(20):
        given = choices(seed)
        dense = sum(each[0].cost for each in given.values())
        cost, error = spent(choose(given, budget))
        assert cost <= budget * dense * (1 + 1e-9)
        all_of_them = (dict(zip(given, each, strict=True)) for each in itertools.product(*given.values()))
        best = min(error for cost, error in map(spent, all_of_them) if cost <= budget * dense * (1 + 1e-9))
        ratios.append((error + 1e-9) / (best + 1e-9))
    assert min(ratios) >= 1 - 1e-6
    assert sum(ratios) / len(ratios) < 1.25
    assert sum(ratio < 1.001 for ratio in ratios) >= 6


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"budget=0.1 cannot be met: .* 0.125 of the dense cost is left"):
        choose(choices(0), 0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def test_costs_are_what_they_are_called() -> None:
    model, x = net(), torch.randn(512, 32)
    before = [value.clone() for value in model.state_dict().values()]
    macs = ow.allocate(model, [x], budget=0.4, of="macs")
    sizes = {"0.weight": 512 * 64 * 32, "2.weight": 512 * 64 * 64, "4.weight": 512 * 16 * 64}
    assert {name: each[0].cost for name, each in macs.choices.items()} == sizes
    left = sum(sizes[name] * (macs[name].density if name in macs else 1) for name in sizes)
    assert macs.cost == left / sum(sizes.values()) <= 0.4
    bits = ow.allocate(model, [x], budget=0.4, of="bytes").choices["0.weight"]
    assert [(str(each.pattern), each.cost) for each in bits] == [
        ("None", 2048 * 32),
        ("2:4", 1024 * 32 + 512 * 4),
        ("1:4", 512 * 32 + 512 * 2),
        ("1:8", 256 * 32 + 256 * 3),
        ("1:16", 128 * 32 + 128 * 4),
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert str(macs).splitlines()[-1] == f"macs: {macs.cost:.3f} of dense; sum of errors {macs.error:.4f}"


def test_time_is_what_plan_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose kernel does not win saves nothing, and one that plan knows no time of is left dense."""

    def plan(model: nn.Module, example: torch.Tensor, pattern: ow.Selection) -> ow.Plan:
        def timing(name: str, dense: float, sparse: float) -> object:
            (chosen,) = {str(each) for each in pattern.patterns.values()}
            kind = "gemm" if 0 < sparse < dense else None
            taken = sparse * {"2:4": 1, "1:4": 0.5}[chosen]
            return type("Timing", (), {"name": name, "dense": dense, "sparse": taken, "kind": kind})()

        return type(
            "Plan", (), {"layers": [timing("0.weight", 4, 3), timing("2.weight", 8, 9), timing("4.weight", 0, 0)]}
        )()

    monkeypatch.setattr(allocate, "plan", plan)
    found = ow.allocate(net(), [torch.randn(256, 32)], budget=0.9, of="time", patterns=["2:4", "1:4"])
    assert {name: [each.cost for each in every] for name, every in found.choices.items()} == {
        "0.weight": [4, 3, 1.5],
        "2.weight": [8, 8, 8],
    }
    assert found == {"0.weight": ow.Pattern(1, 4)}


class Two(nn.Module):
    """Two layers of one size, each with its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 64), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.a(x) + self.b(y)
        return out


def test_what_it_returns_is_what_prune_takes_and_is_better_than_uniform() -> None:
    """The first layer has inputs of low rank, so that it can be thinned for nothing."""
    torch.manual_seed(0)
    model, batch = Two(), (torch.randn(1024, 2) @ torch.randn(2, 128), torch.randn(1024, 128))
    found = ow.allocate(model, [batch], budget=0.5, of="macs", patterns=["3:4", "2:4", "1:4"])
    assert found == {"a.weight": ow.Pattern(1, 4), "b.weight": ow.Pattern(3, 4)}
    uniform = sum(each.error for every in found.choices.values() for each in every if each.pattern == ow.Pattern(2, 4))
    assert found.error < 0.5 * uniform
    report = ow.prune(model, found, [batch])
    assert report.report.sparse == dict(found)


def test_bad_budgets_are_refused() -> None:
    x = [torch.randn(64, 32)]
    with pytest.raises(ValueError, match="of='flops'; needed one of 'time', 'macs', 'bytes'"):
        ow.allocate(net(), x, of="flops")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget=0; needed a share"):
        ow.allocate(net(), x, budget=0)
    with pytest.raises(ValueError, match="patterns is empty"):
        ow.allocate(net(), x, patterns=[])
    with pytest.raises(ValueError, match="matches no weight"):
        ow.allocate(net(), x, exclude=["nothing"])
    with pytest.raises(ValueError, match="no weight that can be sparse"):
        ow.allocate(nn.Linear(7, 8), [torch.randn(64, 7)])


class Outputs(nn.Module):
    """A network whose outputs are made something else of."""

    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layers(x))


def errors_of(function: Callable[[Tensor], Any]) -> list[float]:
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    found = ow.allocate(Outputs(function), [x], of="macs", solver=ow.SparseGPT(), patterns=["2:4"])
    return [choice.error for choice in found.chosen.values()]


def test_outputs_are_found_wherever_they_are() -> None:
    expected = errors_of(lambda y: y)
    assert min(expected) > 0
    assert errors_of(lambda y: {"scores": [y], "size": 3, "best": y.argmax(-1)}) == expected
    hidden = errors_of(lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], 1))
    assert hidden == pytest.approx(expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: y.argmax(-1), "no real numbers"),
        (lambda y: y * 0, "zeros alone"),
        (lambda y: y[y > 0.1], "have other shapes"),
    ],
)
def test_outputs_that_cannot_be_compared_are_an_error(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        errors_of(function)
