"""What of torch takes a weight away from its layer, or puts another in its place, beside a mask."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import openwork as ow


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def sparse() -> nn.Sequential:
    model = net()
    ow.sparsify(model, "2:4")
    return model


@pytest.fixture(params=[True, False], ids=["swap", "set"])
def _swaps(request):
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swaps")
@pytest.mark.parametrize("leave", [True, False])
def test_removing_the_mask_is_refused_and_changes_nothing(leave) -> None:
    model, other, x = sparse(), sparse(), torch.randn(2, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"of a sparsified Linear: call ow\.finalize\(model\)"):
        parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=leave)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    later = sparse()
    for each in (model, other, later):
        each(x)
        ow.verify(each, x)
    ow.finalize(model)
    assert type(model[0]) is nn.Linear


def test_deleting_the_property_of_the_class_is_refused() -> None:
    model = sparse()
    with pytest.raises(RuntimeError, match="removing the parametrization of weight"):
        del type(model[0]).weight
    model(torch.randn(2, 16))


AFTERWARDS = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight_norm": lambda layer: weight_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "global prune": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
    "transfer": lambda layer: parametrize.transfer_parametrizations_and_params(layer, nn.Linear(16, 16), "weight"),
    "fuse": lambda layer: nn.utils.fusion.fuse_linear_bn_eval(layer.eval(), nn.BatchNorm1d(16).eval()),
    "script": torch.jit.script,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("call", AFTERWARDS.values(), ids=AFTERWARDS.keys())
def test_what_replaces_a_weight_says_which_order_works(call) -> None:
    model, x = sparse(), torch.randn(2, 16)
    before = model(x)
    with pytest.raises(RuntimeError, match=r"ow\.sparsify|finalize"):
        call(model[0])
    assert torch.equal(model(x), before)
    ow.verify(model, x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove\(module, 'weight'\) first"),
        (lambda layer: spectral_norm(layer), "use that of torch.nn.utils.parametrizations, after"),
        (lambda layer: parametrizations.spectral_norm(layer), "already parametrized"),
    ],
)
def test_what_was_replaced_before_is_left_alone_with_the_reason(call, reason) -> None:
    model = net()
    call(model[0])
    report = ow.sparsify(model, "2:4")
    assert list(report.sparse) == ["1.weight"]
    (found,) = report.skipped.values()
    assert re.search(reason, found)


def test_spectral_norm_on_top_keeps_the_zeros() -> None:
    model, x = sparse(), torch.randn(2, 16)
    parametrizations.spectral_norm(model[0])
    assert model[0].weight.count_nonzero() == 128
    model(x).sum().backward()
    ow.verify(model.eval())


# Who looks at every attribute


def test_every_attribute_can_be_looked_at() -> None:
    model = sparse()
    members = dict(inspect.getmembers(model[0]))
    assert {"weight", "bias", "_distribute_module_applied"} <= members.keys()
    assert hasattr(model[0], "_distribute_module_applied")
    assert not hasattr(model[0], "qconfig")
    assert "2:4" in repr(model)


def test_a_style_of_torch_is_still_refused() -> None:
    with pytest.raises(RuntimeError, match="ParallelStyle"):
        bool(sparse()[0]._distribute_module_applied)
