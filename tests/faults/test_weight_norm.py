"""Weight normalization: the mask lies on the direction v, so that the computed weight g v / |v| is N:M."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import openwork as ow
from openwork.export import to_huggingface, to_onnx
from openwork.nm.groups import Axis
from openwork.nm.masks import too_dense

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
METHODS = (ow.SRSTE(0.02), ow.ASP(), ow.TransposableSRSTE(refresh_every=2), ow.MdGf(2))
NORMS = {"modern": weight_norm, "old": old_weight_norm}
X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


def vocoder(norm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv1d(16, 32, 3, padding=1)),
        nn.LeakyReLU(),
        norm(nn.ConvTranspose1d(32, 16, 4, 2, 1)),
        norm(nn.Conv1d(16, 8, 1)),
        nn.Flatten(),
        norm(nn.Linear(128, 16)),
    )


def trained(norm, method) -> nn.Sequential:
    model = vocoder(norm)
    ow.sparsify(model, "2:4", method)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ow.attach(optimizer, model)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.eval()(X)
    return model


def remove_norm(model: nn.Module) -> None:
    for layer in model:
        if hasattr(layer, "weight_g"):
            remove_weight_norm(layer)
        elif parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")


def check_computed_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model(X)
    for layer in (each for each in model if hasattr(each, "weight")):
        axis = Axis(0 if isinstance(layer, nn.ConvTranspose1d) else 1)
        assert not too_dense(layer.weight, ow.Pattern(2, 4), axis)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_the_direction_is_selected_and_the_lengths_are_not(norm) -> None:
    report = ow.sparsify(vocoder(norm), "2:4", example=X)
    v, g = (
        ("weight_v", "weight_g")
        if norm is old_weight_norm
        else [f"parametrizations.weight.original{i}" for i in (1, 0)]
    )
    assert list(report.sparse) == [f"{i}.{v}" for i in (0, 2, 3, 5)]
    assert list(report.skipped) == [f"{i}.{g}" for i in (0, 2, 3, 5)]
    assert all("its mask lies on the direction" in reason for reason in report.skipped.values())
    assert report.parameters_dense == sum(each.numel() for each in vocoder(norm).parameters())
    assert report.macs_sparse < report.macs_dense


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_the_plain_name_names_it(norm) -> None:
    report = ow.sparsify(vocoder(norm), {"*.weight": "2:4"}, exclude=["0.weight", "3"])
    assert [name.split(".")[0] for name in report.sparse] == ["2", "5"]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_training_keeps_the_computed_weight_sparse(norm, method, tmp_path) -> None:
    model = trained(norm, method)
    check_computed_weights(model)
    with torch.no_grad():
        y = model(X)
    assert len(ow.verify(model, X).sparse) == 4
    resumed = vocoder(norm).eval()
    ow.sparsify(resumed, "2:4", method)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(X), y)
    ow.save(model, tmp_path / "net.safetensors")
    assert torch.equal(ow.load(tmp_path / "net.safetensors", vocoder(norm).eval())(X), y)
    to_huggingface(model, tmp_path / "folder")
    with torch.no_grad():
        model(X)
    copied = copy.deepcopy(model)
    ow.finalize(copied)
    assert torch.equal(copied(X), y)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in vocoder(norm).named_parameters()]
    ow.verify(copied, X, pattern="2:4")


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_without_the_norm_the_finished_model_is_sparse(norm) -> None:
    model = trained(norm, ow.SRSTE(0.02))
    with torch.no_grad():
        y = model(X)
    ow.finalize(model)
    remove_norm(model)
    torch.testing.assert_close(model(X), y)
    assert len(ow.verify(model, X, pattern="2:4").sparse) == 4


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_it_is_deployed_and_leaves_the_model_as_it_is(norm) -> None:
    model = trained(norm, ow.STE())
    with torch.no_grad():
        y = model(X)
    planned = ow.plan(model, X)
    assert {layer.name: str(layer.pattern) for layer in planned.layers} == {f"{i}.weight": "2:4" for i in (0, 2, 3, 5)}
    assert "0.weight" in ow.deploy(model, X).state_dict()
    with torch.no_grad():
        assert torch.equal(model(X), y)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_onnx_has_the_computed_weight(norm, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    model = trained(norm, ow.STE())
    exported = to_onnx(model, X, tmp_path / "net.onnx")
    assert all(matmul.pattern == ow.Pattern(2, 4) and matmul.recorded for matmul in exported.matmuls)
    check_computed_weights(model)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_removing_it_beside_a_mask_is_refused(norm) -> None:
    model = vocoder(norm).eval()
    ow.sparsify(model, "2:4")
    y = model(X)
    with pytest.raises(RuntimeError, match=r"call ow\.finalize\(model\) first"):
        remove_norm(model)
    assert torch.equal(model(X), y)


def test_what_a_forward_left_with_its_graph_is_no_hindrance(tmp_path) -> None:
    model = trained(old_weight_norm, ow.STE())
    y = model(X)  # a forward with gradients: copy.deepcopy(model) raises
    assert not model[0].weight.is_leaf
    torch.testing.assert_close(ow.deploy(model, X)(X), y)
    ow.plan(model, X)
    to_onnx(model, X, tmp_path / "net.onnx")
    to_huggingface(model, tmp_path / "folder")
    y.sum().backward()
    assert not model[0].weight.is_leaf


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_its_lengths_declare_no_dense_direction(norm) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), norm(nn.Linear(32, 32))), torch.randn(2, 32)
    ow.project(model[0], "2:4")
    with pytest.warns(UserWarning, match="inferred"), pytest.raises(ow.NotSparse, match="1 product is not accounted"):
        ow.verify(model, x)
    model = nn.Sequential(nn.Linear(32, 30), norm(nn.Linear(30, 32)))
    ow.sparsify(model, "2:4")
    (reason,) = ow.verify(model, x).products.declared.values()
    assert "30 weights" in reason


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_a_deployed_one_is_pickled(norm) -> None:
    deployed = ow.deploy(trained(norm, ow.STE()), X)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(X), deployed(X))


def test_a_weight_of_negative_lengths_has_no_negative_zeros() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(16, 16)))
    with torch.no_grad():
        model[0].parametrizations.weight.original0.neg_()
    ow.sparsify(model, "2:4", ow.STE())
    deployed = ow.deploy(model, torch.randn(2, 16))
    assert (deployed.state_dict()["0.weight"].signbit().sum(1) <= 8).all()


def test_other_parametrizations_beside_it_are_left_alone() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    assert list(ow.sparsify(model, "2:4").sparse) == ["1.weight"]
