"""In which order weights are pruned: blocks run alone only where they are given the same as in the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.pruning import stages
from openwork.pruning.solver import Groups

SOLVER = ow.SparseGPT()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        out = x + torch.tanh(self.linear(x))
        return out if beside is None else out * beside


class Blocks(nn.Module):
    """Blocks with something of the model's own between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor, int], Tensor]):
        super().__init__()
        self.blocks, self.between = nn.ModuleList([Block() for _ in range(4)]), between

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = self.between(block, x, i)
        return x


def scaled_in_place(block: nn.Module, x: Tensor, i: int) -> Tensor:
    out: Tensor = block(x)
    return out.mul_(3) if i == 2 else out


def with_its_mean(block: nn.Module, x: Tensor, i: int) -> Tensor:
    out: Tensor = block(x, x.mean(-1, keepdim=True) if i == 2 else None)
    return out


def as_it_was(block: nn.Module, x: Tensor, i: int) -> Tensor:
    out: Tensor = block(x)
    return out


def blocks(between: Callable[[nn.Module, Tensor, int], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Blocks(between)


def alike(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize("between", [scaled_in_place, with_its_mean, as_it_was])
def test_blocks_are_given_what_they_are_in_the_model(
    between: Callable[[nn.Module, Tensor, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, model, expected = torch.randn(60, 16), blocks(between), blocks(between)
    ow.prune(model, "2:4", [x, x + 1], solver=SOLVER)
    monkeypatch.setattr(stages, "find_chains", lambda *_: [])  # the whole model runs for each layer
    ow.prune(expected, "2:4", [x, x + 1], solver=SOLVER)
    assert alike(model, expected)


def test_a_layer_that_blocks_share_is_pruned_once_on_the_inputs_of_all() -> None:
    torch.manual_seed(0)
    model = blocks(as_it_was)
    shared = nn.Linear(16, 16)
    for block in model.blocks[1:]:  # type: ignore[index,union-attr]
        block.linear = nn.Sequential(nn.Linear(16, 16), shared)
    report = ow.prune(model, "2:4", [torch.randn(60, 16)], solver=SOLVER)
    told = {layer.name: layer for layer in report.layers}["blocks.1.linear.1.weight"]
    assert told.samples == 3 * 60
    assert told.masked > told.error > 0.01


class InPlace(nn.Module):
    """Normalizes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5).mul_(2)
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def test_a_model_may_write_to_its_input() -> None:
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(60, 16)
    first, before = nn.Linear(16, 16), x.clone()
    first.load_state_dict(model.first.state_dict())
    ow.prune(first, "2:4", [(x - 0.5) * 2], solver=SOLVER)
    ow.prune(model, "2:4", [x], solver=SOLVER)
    ow.allocate(model, [x], of="macs", solver=SOLVER)
    assert torch.equal(x, before)
    assert torch.equal(model.first.weight, first.weight)


class Stopping(ow.SparseGPT):
    """Is interrupted before its layer number `at`."""

    solved, at = 0, 99

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        type(self).solved += 1
        if self.solved > self.at:
            raise KeyboardInterrupt
        return super().solve(weight, gram, groups)

    def __repr__(self) -> str:
        return "Stopping()"


def test_a_block_that_was_pruned_by_half_goes_on_as_it_was(tmp_path: Path) -> None:
    def model() -> nn.Module:
        made = blocks(as_it_was)
        for block in made.blocks:  # type: ignore[union-attr]
            block.linear = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        return made

    given, expected, again = [torch.randn(60, 16)], model(), model()
    ow.prune(expected, "2:4", given, solver=SOLVER)
    with pytest.raises(KeyboardInterrupt):
        ow.prune(model(), "2:4", given, solver=type("First", (Stopping,), {"at": 3})(), resume=tmp_path)
    ow.prune(again, "2:4", given, solver=Stopping(), resume=tmp_path)
    assert Stopping.solved == 5
    assert alike(again, expected)
