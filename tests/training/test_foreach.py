"""The steps that take all weights at once, which a GPU does in one launch: here on a CPU, through the same code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import openwork as ow
from openwork import kernels, ops
from openwork.nm.mask_stats import pack, packed_sad
from openwork.training import foreach


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 4))


def trained(method: Any, patterns: Any) -> tuple[nn.Module, ow.Topology]:
    model, topology = net(), ow.Topology(every=1)
    ow.sparsify(model, patterns, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ow.attach(optimizer, model, topology=topology)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        if step == 1:
            model[4].parametrizations.weight.original.grad = None
        optimizer.step()
    return model, topology


@pytest.mark.parametrize("patterns", ["2:4", {"0.weight": "1:4", "3.weight": "2:8", "*": "2:4"}])
def test_lists_train_the_same_weights(patterns: Any, monkeypatch: Any) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "fuses", lambda weight: False)  # masks first, and one weight after the other
        one_by_one, recorded = trained(ow.SRSTE(0.5), patterns)
    calls: list[int] = []
    monkeypatch.setattr(kernels, "batches", lambda weight: True)
    monkeypatch.setattr(kernels, "fuses", lambda weight: True)

    def counting(gradients: Any, *rest: Any) -> None:
        calls.append(len(gradients))
        real(gradients, *rest)

    real = foreach.foreach_decay
    monkeypatch.setattr(foreach, "foreach_decay", counting)
    listed, again = trained(ow.SRSTE(0.5), patterns)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one.parameters(), listed.parameters(), strict=True))
    assert recorded.records == again.records
    assert calls == ([4, 3, 4] if patterns == "2:4" else [1, 2, 1, 1, 1, 1, 1, 2, 1])


def counted_lists(monkeypatch: Any) -> list[int]:
    """Lists on a CPU; how long each is that is pruned from now on."""
    calls: list[int] = []
    monkeypatch.setattr(kernels, "batches", lambda weight: True)
    monkeypatch.setattr(kernels, "fuses", lambda weight: True)
    real = foreach.straight_through

    def counting(weights: Any, *rest: Any) -> Any:
        calls.append(len(weights))
        return real(weights, *rest)

    monkeypatch.setattr(foreach, "straight_through", counting)
    return calls


@pytest.mark.parametrize("method", [ow.SRSTE(0.5), ow.STE()])
def test_a_forward_prunes_ahead_what_the_last_one_used(method: Any, monkeypatch: Any) -> None:
    one_by_one, _ = trained(method, "2:4")
    calls = counted_lists(monkeypatch)
    listed, _ = trained(method, "2:4")
    assert all(torch.equal(a, b) for a, b in zip(one_by_one.parameters(), listed.parameters(), strict=True))
    assert calls == [4, 4]  # the first of three steps finds out what a forward uses


class Branches(nn.Module):
    """Uses one of its layers, and that twice. Where `between` is set, it is called before the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.right(x)
        if self.between:
            self.between()
        return y + self.right(x)


def test_only_what_was_used_is_pruned_ahead(monkeypatch: Any) -> None:
    calls, model, x = counted_lists(monkeypatch), Branches(), torch.randn(3, 8)
    ow.sparsify(model, "2:4")
    model(x), model(x)
    assert calls == [1]
    with torch.no_grad():
        model(x)  # finds nothing that was computed without gradients before
        assert calls == [1]
        model(x)
    assert calls == [1, 1]


def test_a_weight_that_changed_is_pruned_anew(monkeypatch: Any) -> None:
    counted_lists(monkeypatch)
    model, x = Branches(), torch.randn(3, 8)
    ow.sparsify(model, "2:4")
    right: Any = model.right.parametrizations.weight.original
    model(x), model(x)

    def reverse() -> None:
        with torch.no_grad():
            right.copy_(right.flip(1))

    reverse()
    assert torch.equal(model(x), 2 * model.right(x))
    before, model.between = model.right(x), reverse
    assert torch.equal(model(x), before + model.right(x))
    assert not torch.equal(before, model.right(x))


def test_each_weight_has_a_backward_node_of_its_own(monkeypatch: Any) -> None:
    """So that wrappers may send a gradient while others are computed."""
    counted_lists(monkeypatch)
    model, x = net(), torch.randn(2, 4, 8, 8)
    ow.sparsify(model, "2:4")
    model(x)
    loss = model(x).square().mean()
    for weight in [each for each in model.parameters() if each.ndim > 1]:
        (alone,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert alone.count_nonzero() > alone.numel() // 2


def test_the_term_is_in_the_weights() -> None:
    """So that the test above cannot pass without it."""
    with_term, _ = trained(ow.SRSTE(0.5), "2:4")
    without, _ = trained(ow.SRSTE(0.0), "2:4")
    assert not torch.equal(with_term[3].parametrizations.weight.original, without[3].parametrizations.weight.original)


@pytest.mark.parametrize("method", [ow.SRSTE(), ow.ASP()])
def test_masks_are_the_same_in_lists(method: Any, monkeypatch: Any) -> None:
    model = net()
    ow.sparsify(model, {"0.weight": "1:4", "*": "2:4"}, method)
    expected = ow.masks(model)
    calls: list[int] = []
    real = foreach.foreach_mask
    monkeypatch.setattr(kernels, "batches", lambda weight: True)
    monkeypatch.setattr(kernels, "fuses", lambda weight: True)
    monkeypatch.setattr(foreach, "foreach_mask", lambda scores, *rest: calls.append(len(scores)) or real(scores, *rest))
    found = ow.masks(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert calls == ([] if method.schedule.stores_mask else [1, 3])


@pytest.mark.parametrize(("state", "expected"), [("", True), ("capturing", False), ("compiling", False)])
def test_no_list_goes_into_a_graph(state: str, expected: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state == "capturing")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: state == "compiling")
    weight: Any = SimpleNamespace(is_cuda=True)
    assert kernels.batches(weight) is expected


def test_operators_on_lists_are_those_on_their_members() -> None:
    kept = [torch.rand(shape) < 0.5 for shape in ((3, 5), (8, 8), (0,))]
    packed = ops.foreach_pack(kept)
    assert all(torch.equal(a, pack(b)) for a, b in zip(packed, kept, strict=True))
    others = [pack(torch.rand(mask.shape) < 0.5) for mask in kept]
    assert ops.foreach_packed_sad(packed, others) == [packed_sad(a, b) for a, b in zip(packed, others, strict=True)]
    assert ops.foreach_pack([]) == ops.foreach_packed_sad([], []) == []
    with pytest.raises(ValueError, match="packed masks of 2 and 8 bytes"):
        ops.foreach_packed_sad(packed[:1], others[1:2])


LISTED = ("foreach_mask", "foreach_prune", "foreach_decay", "foreach_pack", "foreach_packed_sad")


@pytest.mark.parametrize("name", LISTED)
def test_fake_kernels_fit(name: str) -> None:
    weights = [torch.randn(4, 8), torch.randn(3, 4, 2)]
    each = (2, 4, [1, 1, 0, 1, 1, 0])
    masks = [weight > 0 for weight in weights]
    arguments = {
        "foreach_mask": ([weight.abs() for weight in weights], *each),
        "foreach_prune": (weights, *each),
        "foreach_decay": ([torch.zeros_like(weight) for weight in weights], weights, 0.5, *each),
        "foreach_pack": (masks,),
        "foreach_packed_sad": ([pack(mask) for mask in masks], [pack(~mask) for mask in masks]),
    }
    torch.library.opcheck(getattr(torch.ops.openwork, name).default, arguments[name])


@pytest.mark.parametrize("name", LISTED[3:])
def test_compilers_are_told_that_lists_do_not_fit_cuda_graphs(name: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.openwork, name).default.tags
