"""The steps that take all weights at once, which a GPU does in one launch: here on a CPU, through the same code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import openwork as ow
from openwork import kernels, ops, parametrization
from openwork.metrics import pack, packed_sad


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
    one_by_one, recorded = trained(ow.SRSTE(0.5), patterns)
    calls: list[int] = []
    monkeypatch.setattr(kernels, "takes_lists", lambda weight: True)
    monkeypatch.setattr(parametrization.kernels, "in_one_pass", lambda weight: True)

    def counting(gradients: Any, *rest: Any) -> None:
        calls.append(len(gradients))
        real(gradients, *rest)

    real = ops.add_decayed_list
    monkeypatch.setattr(ops, "add_decayed_list", counting)
    listed, again = trained(ow.SRSTE(0.5), patterns)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one.parameters(), listed.parameters(), strict=True))
    assert recorded.records == again.records
    assert calls == ([4, 3, 4] if patterns == "2:4" else [1, 2, 1, 1, 1, 1, 1, 2, 1])


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
    real = parametrization.keep_largest_list
    monkeypatch.setattr(kernels, "takes_lists", lambda weight: True)
    monkeypatch.setattr(kernels, "in_one_pass", lambda weight: True)
    monkeypatch.setattr(
        parametrization, "keep_largest_list", lambda scores, *rest: calls.append(len(scores)) or real(scores, *rest)
    )
    found = ow.masks(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert calls == ([] if method.fixed else [1, 3])


def test_operators_on_lists_are_those_on_their_members() -> None:
    kept = [torch.rand(shape) < 0.5 for shape in ((3, 5), (8, 8), (0,))]
    packed = ops.pack_list(kept)
    assert all(torch.equal(a, pack(b)) for a, b in zip(packed, kept, strict=True))
    others = [pack(torch.rand(mask.shape) < 0.5) for mask in kept]
    assert ops.packed_sad_list(packed, others) == [packed_sad(a, b) for a, b in zip(packed, others, strict=True)]
    assert ops.pack_list([]) == ops.packed_sad_list([], []) == []
    with pytest.raises(ValueError, match="packed masks of 2 and 8 bytes"):
        ops.packed_sad_list(packed[:1], others[1:2])


@pytest.mark.parametrize("name", ["keep_largest_list", "add_decayed_list", "pack_list", "packed_sad_list"])
def test_fake_kernels_fit(name: str) -> None:
    weights = [torch.randn(4, 8), torch.randn(3, 4, 2)]
    each = (2, 4, [1, 1], [1, 1], [False, False])
    masks = [weight > 0 for weight in weights]
    arguments = {
        "keep_largest_list": ([weight.abs() for weight in weights], *each),
        "add_decayed_list": ([torch.zeros_like(weight) for weight in weights], weights, 0.5, *each),
        "pack_list": (masks,),
        "packed_sad_list": ([pack(mask) for mask in masks], [pack(~mask) for mask in masks]),
    }
    torch.library.opcheck(getattr(torch.ops.openwork, name).default, arguments[name])
