"""One layer under several names of a sparsified model: saved once, with aliases, as when it is finalized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import openwork as ow
from openwork.export import to_huggingface
from openwork.files.checkpoint import describe

METHODS = (ow.SRSTE(0.02), ow.ASP(), ow.TransposableSRSTE())


class Twice(nn.Module):
    """Two parents with one child, which has two names of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(layer), nn.Sequential(layer, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU())] * 3)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def repeated() -> nn.Module:
    head = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(16, 16), head, nn.ReLU(), head)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


MODELS = {"repeated": repeated, "parents": lambda: Twice(nn.Linear(16, 16)), "loop": Loop, "tied": tied}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_it_is_trained_saved_and_loaded(make, method, tmp_path) -> None:
    torch.manual_seed(0)
    model, x, path = make(), torch.randn(4, 16), tmp_path / "net.safetensors"
    report = ow.sparsify(model, "2:4", method, example=x)
    assert report.parameters_dense == sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ow.attach(optimizer, model)
    model(x).square().mean().backward()
    optimizer.step()
    ow.verify(model, x)
    y = model(x)
    ow.save(model, path)
    assert any(entry.alias_of for entry in describe(path))
    for sparsified in (False, True):
        other = make()
        if sparsified:
            ow.sparsify(other, "2:4", method)
        assert torch.equal(ow.load(path, other)(x), y)
    again = make()
    ow.sparsify(again, "2:4", method)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), y)
    to_huggingface(model, tmp_path / "folder")
    finalized = tmp_path / "finalized.safetensors"
    ow.save(ow.finalize(model), finalized, pattern="2:4")
    assert finalized.read_bytes() == path.read_bytes()


def test_the_decay_is_added_once() -> None:
    model = repeated()
    ow.sparsify(model, "2:4", ow.SRSTE(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ow.attach(optimizer, model)
    latent = model[1].parametrizations.weight.original
    before, mask = latent.detach().clone(), ow.masks(model)["1.weight"]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(latent.detach(), torch.where(mask, before, 0.5 * before))


def test_multiply_adds_count_each_use_and_weights_once() -> None:
    report = ow.sparsify(Loop(), "2:4", example=torch.randn(1, 16))
    assert (report.macs_dense, report.parameters_dense) == (3 * 256 + 128, 272 + 136)


def test_any_of_its_names_excludes_it() -> None:
    assert ow.sparsify(repeated(), "2:4", exclude=["3"]).skipped == {"1.weight": "excluded by '3'"}
