"""One weight: what a solver gets and what is made of its answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.pruning.solver import Groups


class Own(ow.Solver):
    """A solver of somebody's own."""

    def __init__(self, function: Callable[[Tensor, Groups], Tensor]):
        object.__setattr__(self, "function", function)

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        found: Tensor = self.function(weight, groups)  # type: ignore[attr-defined]
        return found


def by_magnitude(weight: Tensor, groups: Groups) -> Tensor:
    return weight * groups.mask(weight.abs())


def fails(weight: Tensor, groups: Groups) -> Tensor:
    raise RuntimeError("of its own")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda weight, groups: weight[:2], r"gave .*\(2, 16\).*, needed a tensor of shape \(8, 16\)"),
        (lambda weight, groups: None, r"gave None, needed a tensor of shape \(8, 16\)"),
        (lambda weight, groups: weight, "32 of 32 groups hold more than 2 of 4"),
        (fails, "of its own"),
    ],
)
def test_a_bad_answer_is_told_and_changes_nothing(function: Callable[[Tensor, Groups], Tensor], message: str) -> None:
    layer, x = nn.Linear(16, 8), torch.randn(60, 16)
    before = layer.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ow.prune(layer, "2:4", [x], solver=Own(function))
    assert torch.equal(layer.weight, before)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ow.allocate(layer, [x], of="macs", solver=Own(function))
    assert torch.equal(layer.weight, before)


def test_a_solver_may_write_to_what_it_is_given() -> None:
    layer, x = nn.Linear(16, 8), torch.randn(60, 16)
    before = layer.weight.detach().clone()
    (told,) = ow.prune(layer, "2:4", [x], solver=Own(lambda w, groups: w.copy_(by_magnitude(w, groups)))).layers
    change = layer.weight.detach() - before
    error = (x @ change.T).square().sum() / (x @ before.T).square().sum()
    assert told.error == pytest.approx(float(error), rel=1e-4)


def test_an_answer_that_is_not_finite_is_told() -> None:
    (told,) = ow.prune(nn.Linear(16, 8), "2:4", [torch.randn(60, 16)], solver=Own(lambda w, _: w / 0)).layers
    assert told.note == "by Wanda: what the solver gave is not finite"


def test_autocast_of_the_caller_does_not_reach_the_solver() -> None:
    torch.manual_seed(0)
    x = (torch.randn(500, 16) + 3).bfloat16().float()
    one, other = nn.Linear(16, 8), nn.Linear(16, 8)
    with torch.no_grad():
        one.weight.copy_(one.weight.bfloat16())
        other.load_state_dict(one.state_dict())
    expected = ow.prune(one, "2:4", [x], solver=ow.ALPS())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ow.prune(other, "2:4", [x], solver=ow.ALPS())
    assert found.errors == expected.errors
    assert torch.equal(one.weight, other.weight)


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(1, 16).expand(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.linear(x), self.weight)


def test_a_weight_whose_numbers_share_memory_is_left_alone() -> None:
    report = ow.prune(Expanded(), "2:4", [torch.randn(60, 16)], axis={"weight": 1})
    assert list(report.errors) == ["linear.weight"]
    assert "share memory" in report.skipped["weight"]
