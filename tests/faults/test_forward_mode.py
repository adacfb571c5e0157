"""Forward-mode derivatives through a sparsified model: the tangent goes through the transposed map of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap

import openwork as ow
from openwork.methods import Method


@dataclass(frozen=True)
class Centred(Method):
    """A method whose gradient mixes the positions of a group, by a map that is not its own transpose."""

    name: ClassVar[str] = "centred"
    elementwise: ClassVar[bool] = False

    def backward(self, gradient, mask, phase, state):
        return gradient - 2 * gradient.roll(1, -1)


METHODS = (ow.SRSTE(), ow.ASP(), ow.TransposableSRSTE(), ow.MdGf(10), ow.MdGf(10, straight_through=True), ow.Dense())
WEIGHT = "0.parametrizations.weight.original"


def model_of(method: ow.Method, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    ow.sparsify(model, "2:4", method)
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    x = torch.randn(3, 8, dtype=dtype)
    return (lambda given: functional_call(model, given, (x,))), parameters


def tangents(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(each) for name, each in parameters.items()}


@pytest.mark.parametrize("method", [*METHODS, Centred()], ids=str)
def test_jvp_is_the_transpose_of_vjp(method) -> None:
    function, parameters = model_of(method)
    given = tangents(parameters)
    y, tangent = jvp(function, (parameters,), (given,))
    left = torch.randn_like(y)
    (gradients,) = vjp(function, parameters)[1](left)
    torch.testing.assert_close((left * tangent).sum(), sum((gradients[name] * given[name]).sum() for name in given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*METHODS, Centred()], ids=str)
def test_dual_numbers_give_the_same(method, dtype) -> None:
    function, parameters = model_of(method, dtype)
    given = tangents(parameters)
    y, expected = jvp(function, (parameters,), (given,))
    with forward.dual_level():
        dual = function({name: forward.make_dual(each, given[name]) for name, each in parameters.items()})
        value, tangent = forward.unpack_dual(dual)
    assert torch.equal(value, y)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_jacobians_and_hessians_agree_in_every_order(method) -> None:
    function, parameters = model_of(method)

    def loss(weight: Tensor) -> Tensor:
        return function({**parameters, WEIGHT: weight}).square().sum()

    weight = parameters[WEIGHT]
    torch.testing.assert_close(jacfwd(loss)(weight), jacrev(loss)(weight))
    expected = jacrev(jacrev(loss))(weight)
    for second in (hessian(loss), jacrev(jacfwd(loss)), jacfwd(jacfwd(loss))):
        torch.testing.assert_close(second(weight), expected)
    product = torch.autograd.functional.hvp(loss, weight, torch.ones_like(weight))[1]
    torch.testing.assert_close(product, expected.sum((-1, -2)))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_many_tangents_at_once(method) -> None:
    function, parameters = model_of(method)
    given = [tangents(parameters) for _ in range(2)]
    stacked = {name: torch.stack([each[name] for each in given]) for name in parameters}
    found = vmap(lambda each: jvp(function, (parameters,), (each,))[1])(stacked)
    for one, each in zip(found, given, strict=True):
        torch.testing.assert_close(one, jvp(function, (parameters,), (each,))[1])


def test_a_straight_through_tangent_reaches_what_is_pruned() -> None:
    layer = nn.Linear(4, 1, bias=False)
    ow.sparsify(layer, "2:4", ow.STE())
    name = "parametrizations.weight.original"
    weight = layer.parametrizations.weight.original.detach()
    _, tangent = jvp(
        lambda w: functional_call(layer, {name: w}, (torch.ones(1, 4),)), (weight,), (torch.ones_like(weight),)
    )
    assert float(tangent) == 4.0
