"""`ow.prune`: blocks in their order, what is kept and resumed, and what bad input is told."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.pruning import chains
from openwork.pruning.solver import Groups
from openwork.training.selection import Selection


class Block(nn.Module):
    """A residual layer that is also given a scale, the same for all blocks, and counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(16, 16), 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, str]:
        self.runs += 1
        return x + torch.tanh(self.linear(x * scale if scale is not None else x)), "and more"


class Net(nn.Module):
    def __init__(self, blocks: int = 4, kind: type[nn.Module] = Block):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, 16), nn.ModuleList([kind() for _ in range(blocks)]), None
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = torch.linspace(0.5, 1.5, 16)
        for block in self.blocks:
            x = block(x, scale=scale)[0]
        out: Tensor = self.head(x)
        return out


def net(kind: type[nn.Module] = Block) -> Net:
    torch.manual_seed(0)
    return Net(kind=kind)


def batches(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(20 + i, 8, generator=draw) for i in range(count)]


SOLVER = ow.SparseGPT()


def alike(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_each_layer_is_pruned_on_what_comes_from_the_pruned_ones_before_it() -> None:
    """Layer by layer, the whole model run for each: the same weights, up to the order of sums."""
    model, expected = net(), net()
    report = ow.prune(model, "2:4", batches(), solver=SOLVER)
    for name in report.errors:
        others = [other for other in report.errors if other != name]
        ow.prune(expected, "2:4", batches(), solver=SOLVER, exclude=others)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_blocks_of_a_chain_run_alone() -> None:
    """A block runs once to look, once for each batch to be taken, twice to see that it runs again as it did, then once
    to be seen and once to go on; the last is not reached while the others are taken."""
    model = net()
    ow.prune(model, "2:4", batches(), solver=SOLVER)
    of_the_head_and_the_stem, tried, looked = 3 + 3, 1, 1
    runs = [block.runs - of_the_head_and_the_stem - tried - looked for block in model.blocks]
    assert runs == [*3 * [3 + 2 + 3 + 3], 3]


class Growing(Block):
    """What it returns depends on how often it ran, as with a cache: it cannot be run again by itself."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, str]:
        return super().forward(x + 0.1 * self.runs, scale)


class Skipping(Net):
    """Its last block is given what the first returned, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.blocks[0](self.stem(x))[0]
        for block in list(self.blocks)[1:-1]:
            x = block(x)[0]
        out: Tensor = self.head(self.blocks[-1](x, first)[0])
        return out


def test_blocks_that_cannot_run_alone_are_pruned_in_the_whole_model() -> None:
    torch.manual_seed(0)
    model, expected = Skipping(), Skipping()
    expected.load_state_dict(model.state_dict())
    report = ow.prune(model, "2:4", batches(), solver=SOLVER)
    for name in report.errors:
        others = [other for other in report.errors if other != name]
        ow.prune(expected, "2:4", batches(), solver=SOLVER, exclude=others)
    assert alike(model, expected)
    growing = net(Growing)
    report = ow.prune(growing, "2:4", batches(), solver=SOLVER)
    assert len(report.layers) == 6
    assert growing.blocks[3].runs > 3 * 6, "the whole model ran for each of six layers"


def test_a_sequential_in_a_sequential_is_one_chain() -> None:
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(2)]
    model = nn.Sequential(*inner, nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 8)))
    x = torch.randn(2, 8, 6, 6)
    probe = chains.Probe.of(model, x)
    decided = {each.name: each for each in stages_candidates(model)}
    (chain,) = chains.find_chains(model, decided, probe)
    assert [name for name, _ in chain.blocks] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2", "2.0", "2.1"]


def stages_candidates(model: nn.Module) -> list[Any]:
    from openwork.training.select import decide

    return [each for each in decide(model, Selection("2:4")) if each.pattern]


def test_batches_may_be_a_generator_of_any_form_of_input() -> None:
    tensors, expected = batches(), net()
    ow.prune(expected, "2:4", tensors, solver=SOLVER)
    for form in (lambda x: (x,), lambda x: {"x": x}):
        model = net()
        ow.prune(model, "2:4", (form(x) for x in tensors), solver=SOLVER)
        assert alike(model, expected)


def test_what_a_selection_says_holds() -> None:
    model = net()
    selection = Selection({"blocks": "1:4", "*": "2:4"}, exclude=["head"], transposable=True)
    report = ow.prune(model, selection, batches(), solver=SOLVER)
    assert report.skipped == {"head.weight": "excluded by 'head'"}
    assert {name: str(pattern) for name, pattern in report.report.sparse.items()} == {
        "stem.weight": "2:4",
        **{f"blocks.{i}.linear.weight": "1:4" for i in range(4)},
    }
    assert ow.verify(model, pattern=selection).rows
    assert str(report).splitlines()[-1] == "  dense: head.weight (excluded by 'head')"


def test_a_half_precision_model_stays_one() -> None:
    model = net().bfloat16()
    model.forward = lambda x: model.head(model.blocks[0](model.stem(x))[0])  # type: ignore[method-assign]
    report = ow.prune(model, "2:4", [x.bfloat16() for x in batches()], exclude=["blocks.[123]"])
    assert model.stem.weight.dtype == torch.bfloat16
    assert report.error < 0.2
    ow.verify(model, pattern=Selection("2:4", exclude=["blocks.[123]"]))


def test_nothing_else_of_the_model_changes() -> None:
    model = net().train()
    model.config = type("Config", (), {"use_cache": True})()  # type: ignore[assignment]
    model.head.eval()
    biases = copy.deepcopy({name: value for name, value in model.state_dict().items() if "bias" in name})
    before = torch.random.get_rng_state()
    ow.prune(model, "2:4", batches())
    assert model.config.use_cache is True
    assert model.training
    assert not model.head.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in biases.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_wider_the_pattern_the_more_is_lost() -> None:
    errors = [ow.prune(net(), pattern, batches(), solver=SOLVER).error for pattern in ("4:4", "3:4", "2:4", "1:4")]
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert errors == sorted(errors)


def test_masks_that_are_known_are_kept_and_refitted() -> None:
    """Those of a network that SR-STE trained from this one."""
    model, trained = net(), net()
    ow.sparsify(trained, "2:4", ow.SRSTE())
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    masks = ow.masks(trained)
    report = ow.prune(model, "2:4", batches(), solver=ow.Refit(), masks=masks)
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert all(layer.error < layer.masked for layer in report.layers)
    with pytest.raises(ValueError, match=r"chooses its own; needed solver=ow\.Refit"):
        ow.prune(net(), "2:4", batches(), masks=masks)
    with pytest.raises(ValueError, match=r"masks has none of stem\.weight"):
        ow.prune(net(), "2:4", batches(), solver=ow.Refit(), masks={})
    with pytest.raises(ValueError, match=r"masks\['stem\.weight'\]: 32 of 32 groups"):
        ow.prune(net(), "1:4", batches(), solver=ow.Refit(), masks=masks)


# --- stopped and resumed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stopping(ow.SparseGPT):
    """Is interrupted before its layer number `at`."""

    at: int = 99
    solved: Any = None

    def solve(self, weight: Tensor, gram: Tensor, groups: Groups) -> Tensor:
        self.solved.append(1)
        if len(self.solved) > self.at:
            raise KeyboardInterrupt
        return super().solve(weight, gram, groups)

    def __repr__(self) -> str:
        return "Stopping()"


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, at: int) -> None:
    expected = net()
    whole = ow.prune(expected, "2:4", batches(), solver=SOLVER)
    with pytest.raises(KeyboardInterrupt):
        ow.prune(net(), "2:4", batches(), solver=Stopping(at=at, solved=[]), resume=tmp_path)
    model, solved = net(), list[int]()
    report = ow.prune(model, "2:4", batches(), solver=Stopping(solved=solved), resume=tmp_path)
    assert len(solved) == 6 - at, "no layer is pruned twice"
    assert alike(model, expected)
    assert report.errors == whole.errors
    again = ow.prune(net(), "2:4", batches(), solver=Stopping(at=0, solved=[]), resume=tmp_path)
    assert again.layers == report.layers


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    ow.prune(net(), "2:4", batches(), solver=SOLVER, resume=tmp_path)
    other = net()
    with torch.no_grad():
        other.stem.weight[0, 0] += 1
    cases: Iterator[tuple[Any, ...]] = iter([
        (other, "2:4", batches(), SOLVER, "weights"),
        (net(), "1:4", batches(), SOLVER, "weights"),
        (net(), "2:4", batches(2), SOLVER, "batches"),
        (net(), "2:4", batches(), ow.Wanda(), "solver"),
    ])  # fmt: skip
    for model, pattern, given, solver, what in cases:
        with pytest.raises(ValueError, match=f"holds a run with other {what}; choose another folder"):
            ow.prune(model, pattern, given, solver=solver, resume=tmp_path)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_input_that_cannot_calibrate_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches has no batch"):
        ow.prune(net(), "2:4", [])
    for one, kind in ((batches()[0], "Tensor"), ({"x": batches()[0]}, "dict")):
        with pytest.raises(TypeError, match=f"batches is one {kind}; needed an iterable"):
            ow.prune(net(), "2:4", one)
    with pytest.raises(TypeError, match=r"needed a solver object such as ow.ALPS\(\)"):
        ow.prune(net(), "2:4", batches(), solver=ow.ALPS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis='kernel'"):
        ow.prune(net(), "2:4", batches(), axis="kernel")
    broken = net()
    with torch.no_grad():
        broken.stem.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"stem\.weight holds NaN or infinity"):
        ow.prune(broken, "2:4", batches())
    sparse = net()
    ow.sparsify(sparse, "2:4")
    with pytest.raises(ValueError, match="sparsified already"):
        ow.prune(sparse, "2:4", batches())
    normalized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="a part of a normalized weight: fold it"):
        ow.prune(normalized, "2:4", [torch.randn(32, 8)])
    both = ow.prune(nn.Sequential(normalized, nn.Linear(8, 8)), "2:4", [torch.randn(32, 8)])
    assert list(both.errors) == ["1.weight"]
    assert len(both.skipped) == 2
    with pytest.raises(ValueError, match="on cpu, meta; needed one device"):
        ow.prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta")), "2:4", [torch.randn(32, 8)])


def test_labels_beside_the_input_are_named() -> None:
    x = batches()[0]
    with pytest.raises(TypeError, match=r"\(x for x, y in loader\)"):
        ow.prune(net(), "2:4", [(x, torch.zeros(20))])


def test_nan_is_told_with_the_layer_that_it_reaches_first() -> None:
    given = batches()
    given[1][3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"the inputs of stem\.weight are not finite"):
        ow.prune(net(), "2:4", given)
    model = net()
    with torch.no_grad():
        model.blocks[1].linear.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the inputs of blocks\.2\.linear\.weight are not finite.* pruned already"):
        ow.prune(model, "2:4", batches(), exclude=["blocks.1"])


@pytest.mark.parametrize("solver", [ow.Wanda(), SOLVER, ow.Refit(), ow.ALPS()], ids=repr)
def test_inputs_that_are_always_zero_do_no_harm(solver: ow.Solver) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    x[:, [0, 1, 2, 9]] = 0
    model = nn.Linear(16, 8)
    (told,) = ow.prune(model, "2:4", [x], solver=solver).layers
    assert told.note == ""
    assert told.error < 0.3
    assert (model.weight != 0).unflatten(1, (-1, 4)).sum(-1).eq(2).all()
    model = nn.Linear(16, 8)
    (told,) = ow.prune(model, "2:4", [torch.zeros(64, 16)], solver=solver).layers
    assert told.note == "by magnitude: its inputs were all zero"


def test_a_singular_gram_matrix_is_damped_and_told() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    x[:, 8:] = x[:, :8]
    model = nn.Linear(16, 8)
    (told,) = ow.prune(model, "2:4", [x], solver=ow.SparseGPT(damp=0)).layers
    assert told.note.startswith("damped by ")
    assert told.error < told.masked


def test_few_samples_are_told() -> None:
    (told,) = ow.prune(nn.Linear(64, 8), "2:4", [torch.randn(15, 64)]).layers
    assert told.note == "by Wanda: fewer samples than a 4th of its 64 inputs"
    assert told.samples == 15
