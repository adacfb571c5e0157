"""Code that writes into the weight of a sparse layer changes the dense weight, or is told where it happens."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import openwork as ow

STORED = (ow.ASP(), ow.TransposableSRSTE())
METHODS = (ow.SRSTE(), *STORED)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def sparse(method: ow.Method = METHODS[0]) -> nn.Sequential:
    model = net()
    ow.sparsify(model, "2:4", method)
    return model


def dense(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    return layer.parametrizations[name].original


def fill_row(weight: Tensor) -> None:
    weight[3, 2:9] = 5.0


def fill_view(weight: Tensor) -> None:
    weight.view(-1)[:7].zero_()


def fill_part(weight: Tensor) -> None:
    weight.chunk(2)[1].T.unbind(0)[3].fill_(2.0)


def scale_all(weight: Tensor) -> None:
    torch._foreach_mul_([weight], 2.0)


def clamp_into(weight: Tensor) -> None:
    torch.clamp(weight, -0.01, 0.01, out=weight)


WRITES: tuple[Callable[[Tensor], object], ...] = (
    lambda weight: weight.copy_(torch.arange(256.0).view(16, 16)),
    lambda weight: weight.mul_(3.0).add_(1.0),
    lambda weight: weight.clamp_(-0.01, 0.01),
    lambda weight: weight.detach().t().mul_(2.0),
    lambda weight: torch.ops.aten.mul_.Tensor(weight, 2.0),
    fill_row,
    fill_view,
    fill_part,
    scale_all,
    clamp_into,
)


@pytest.mark.parametrize("through", [lambda w: w, lambda w: w.data, lambda w: w.detach()], ids=["", "data", "detach"])
@pytest.mark.parametrize("write", WRITES)
def test_in_place_writes_land_in_the_dense_weight(write, through) -> None:
    model = sparse()
    expected = dense(model[0]).detach().clone()
    with torch.no_grad():
        write(expected)
        write(through(model[0].weight))
    assert torch.equal(dense(model[0]), expected)
    ow.verify(model, torch.randn(2, 16))


@pytest.mark.parametrize("write", [Tensor.zero_, Tensor.normal_, lambda w: w.copy_(w.detach().clone()), fill_row])
def test_overwriting_it_where_gradients_are_followed_is_refused_as_in_a_dense_layer(write) -> None:
    for layer in (net()[0], sparse()[0]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            write(layer.weight)


def test_augmented_assignment_lands() -> None:
    model = sparse()
    before = dense(model[0]).detach().clone()
    with torch.no_grad():
        model[0].weight *= 2
    model[0].weight.data *= 2
    model[0].weight.data -= 1
    assert torch.equal(dense(model[0]), before * 4 - 1)


def test_other_data_land() -> None:
    model, value = sparse(), torch.randn(16, 16)
    model[0].weight.data = value
    assert torch.equal(dense(model[0]), value)


INITS = (
    nn.init.zeros_,
    nn.init.ones_,
    nn.init.eye_,
    nn.init.normal_,
    nn.init.trunc_normal_,
    nn.init.xavier_uniform_,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.orthogonal_,
    lambda weight: nn.init.sparse_(weight, 0.3),
)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("through", [lambda w: w, lambda w: w.data], ids=["", "data"])
def test_initializing_anew_is_that_of_a_dense_layer(init, through) -> None:
    model, plain = sparse(), net()
    for each in (model, plain):
        torch.manual_seed(1)
        init(through(each[0].weight))
    assert torch.equal(dense(model[0]), plain[0].weight)
    ow.verify(model)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(16, 16),
        lambda: nn.Conv2d(8, 8, 3),
        lambda: nn.ConvTranspose1d(8, 8, 3),
        lambda: nn.Bilinear(4, 4, 4),
    ],
)
def test_reset_parameters(layer) -> None:
    model, plain = layer(), layer()
    ow.sparsify(model, "2:4", ow.STE(), axis={"*weight*": 1} if isinstance(model, nn.Bilinear) else "input")
    for each in (model, plain):
        torch.manual_seed(2)
        each.reset_parameters()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_a_recurrent_layer_is_reset() -> None:
    """Its own order of parameters decides which draws a weight gets."""
    model = nn.LSTM(8, 8)
    ow.sparsify(model, "2:4")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.reset_parameters()
    assert all(value.abs().max() <= 8**-0.5 for value in model.state_dict().values())
    model.weight_ih_l0.data.fill_(1.0)
    assert torch.equal(dense(model, "weight_ih_l0"), torch.ones(32, 8))


def test_the_packed_weights_of_attention_are_reset() -> None:
    model, plain = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)
    ow.sparsify(model, "2:4", ow.STE())
    for each in (model, plain):
        torch.manual_seed(2)
        each._reset_parameters()
    assert torch.equal(dense(model, "in_proj_weight"), plain.in_proj_weight)


def test_apply_with_a_function_that_initializes() -> None:
    def init(layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(0, 0.02)
            layer.bias.data.zero_()

    model, plain = sparse(), net()
    for each in (model, plain):
        torch.manual_seed(3)
        each.apply(init)
    assert torch.equal(dense(model[0]), plain[0].weight)


class Limited(nn.Linear):
    """As in networks for EEG: the forward itself keeps the norm of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


class Normalized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


def test_a_forward_that_writes_into_its_weight() -> None:
    model = nn.Sequential(Limited(16, 16), Normalized(16, 16))
    ow.sparsify(model, "2:4")
    model(torch.randn(2, 16)).sum().backward()
    assert model[0].weight.norm(dim=1).max() <= 0.1001
    torch.testing.assert_close(model[1].weight.norm(dim=1), torch.ones(16))
    assert dense(model[1]).grad.abs().sum() > 0


def test_clipping_after_each_step() -> None:
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ow.attach(optimizer, model)
    for _ in range(3):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        model[0].weight.data.clamp_(-0.01, 0.01)
    assert dense(model[0]).abs().max() <= 0.01


def test_freezing_and_gradients_are_those_of_the_parameter() -> None:
    model = sparse()
    model(torch.randn(2, 16)).sum().backward()
    assert model[0].weight.grad is dense(model[0]).grad
    model[0].weight.grad = None
    assert dense(model[0]).grad is None
    model[0].weight.requires_grad_(False)
    assert not dense(model[0]).requires_grad
    model[0].weight.requires_grad = True
    assert dense(model[0]).requires_grad


def test_what_only_reads_sees_plain_tensors() -> None:
    model = sparse()
    weight = model[0].weight
    results = (weight + 1, weight.clone(), weight.abs().sum(), weight.double(), nn.functional.linear(weight, weight))
    assert all(type(each) is Tensor for each in results)
    assert all(
        type(each) is Tensor for each in (copy.deepcopy(weight.detach()), pickle.loads(pickle.dumps(weight.data)))
    )
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert type(torch.load(file)) is Tensor
    other = torch.zeros(16, 16).copy_(weight.detach())
    assert torch.equal(other, weight)
    weight.square().sum().backward()
    assert dense(model[0]).grad.count_nonzero() == weight.count_nonzero()


def test_a_parameter_made_of_it_is_a_copy_of_its_own() -> None:
    model, other = sparse(), nn.Linear(16, 16)
    other.weight = nn.Parameter(model[0].weight)
    assert type(other.weight) is nn.Parameter
    assert other.weight.is_leaf
    before = dense(model[0]).detach().clone()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    assert torch.equal(dense(model[0]), before)


# What cannot be sent on


def test_numpy_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        sparse()[0].weight.detach().numpy()[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(sparse()[0].weight.detach())[0, 0] = 1
    copied = np.array(sparse()[0].weight.detach())
    copied += 1
    assert np.count_nonzero(copied == 1) == 128


def test_writing_below_a_further_parametrization_says_so() -> None:
    model = sparse()
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    with pytest.raises(RuntimeError, match=r"weight of a sparsified Linear: beside the mask .* _SpectralNorm"):
        model[0].weight.data.zero_()


@pytest.mark.parametrize("call", [lambda w: w.set_(torch.zeros(16, 16)), lambda w: w.data.resize_(4, 4)])
def test_other_memory_is_refused(call) -> None:
    with pytest.raises(RuntimeError, match=r"of weight of a sparsified Linear: .*ow\.finalize"):
        call(sparse()[0].weight)


@pytest.mark.parametrize("grad", [True, False])
def test_an_optimizer_of_a_computed_weight_is_told_what_to_take(grad) -> None:
    model = sparse()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"model\.parameters\(\)"):
        torch.optim.SGD([model[0].weight], 0.1)


def test_its_type_may_be_asked_for() -> None:
    model = nn.Linear(8, 8)
    ow.sparsify(model, "2:4")
    assert torch.typename(model.weight) == "torch.FloatTensor"
    assert torch.typename(model.weight[0]) == "torch.FloatTensor"


def test_tying_another_layer_to_it_says_what_it_is() -> None:
    model, other = sparse(), nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match=r"weight of a sparsified Linear.* assigned .*before ow\.sparsify"):
        other.weight = model[0].weight


# Models without values


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_from_the_meta_device_is_reset(method) -> None:
    with torch.device("meta"):
        model = net()
    ow.sparsify(model, "2:4", method)
    model.to_empty(device="cpu")
    plain = net()
    for each in (model, plain):
        torch.manual_seed(4)
        each[0].reset_parameters()
        each[2].reset_parameters()
    assert torch.equal(dense(model[0]), plain[0].weight)
    chosen = ow.masks(model)
    state = model.state_dict()
    model(torch.randn(2, 16))
    assert all(torch.equal(mask, chosen[name]) for name, mask in ow.masks(model).items())
    assert all(torch.equal(state[f"{name}_mask"], mask) for name, mask in chosen.items() if f"{name}_mask" in state)
    ow.verify(model, torch.randn(2, 16))
    expected = net()
    expected.load_state_dict(plain.state_dict())
    ow.sparsify(expected, "2:4", method)
    assert all(torch.equal(mask, chosen[name]) for name, mask in ow.masks(expected).items())


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("assign", [True, False])
def test_a_model_from_the_meta_device_is_loaded(method, assign) -> None:
    with torch.device("meta"):
        model = net()
    ow.sparsify(model, "2:4", method)
    if not assign:
        model.to_empty(device="cpu")
    other, x = sparse(method), torch.randn(2, 16)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", STORED, ids=str)
def test_a_mask_outlives_moves_and_casts(method) -> None:
    model = sparse(method)
    before = ow.masks(model)
    with torch.no_grad():
        dense(model[0]).neg_()
        dense(model[0]).add_(torch.randn(16, 16))
    model.half().float().to("cpu").share_memory()
    model(torch.randn(2, 16))
    assert all(torch.equal(mask, before[name]) for name, mask in ow.masks(model).items())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_parameters_are_swapped_on_conversion(method) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = sparse(method)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ow.attach(optimizer, model)
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            model(torch.randn(2, 16, dtype=dtype)).sum().backward()
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            model(torch.randn(2, 16, dtype=dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ow.verify(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_project_and_verify_of_a_model_without_values_say_so() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        ow.project(model, "2:4")
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        ow.verify(model, pattern="2:4")
