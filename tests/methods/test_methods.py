"""Every method keeps the protocol; each one's equation, on numbers worked out by hand."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.methods import ASP, SRSTE, STE, Dense, Method, TransposableSRSTE
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group, magnitude_mask
from openwork.nm.pattern import Pattern

torch.set_num_threads(1)

ALL = [ASP(), Dense(), SRSTE(), STE(), TransposableSRSTE()]
EACH = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
SPARSE = pytest.mark.parametrize("method", [method for method in ALL if method.sparse], ids=lambda method: method.name)

WEIGHT = torch.tensor([[1.0, -4.0, 3.0, -2.0], [0.5, 0.25, -0.75, 0.5]])
KEEP = torch.tensor([[False, True, True, False], [True, False, True, False]])  # 2:4 by magnitude
PRUNED = torch.tensor([[0.0, -4.0, 3.0, 0.0], [0.5, 0.0, -0.75, 0.0]])
GRADIENT = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]])


# --- the protocol ------------------------------------------------------------------------------------------------


@EACH
def test_is_a_method(method: Method) -> None:
    assert isinstance(method, Method)
    assert not isinstance(type("Nothing", (), {"name": "nothing"})(), Method)


def test_names_are_the_field_s() -> None:
    assert {method.name: (method.sparse, method.fixed) for method in ALL} == {
        "asp": (True, True),
        "dense": (False, False),
        "sr-ste": (True, False),
        "ste": (True, False),
        "transposable-sr-ste": (True, False),
    }


@EACH
def test_is_a_frozen_value(method: Method) -> None:
    twin = type(method)()
    assert twin == method
    assert hash(twin) == hash(method)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.decay = 1.0  # type: ignore[attr-defined]


def test_settings_tell_methods_apart() -> None:
    assert len({SRSTE(), SRSTE(1e-3), SRSTE(decay=1e-3), STE(), ASP(), Dense()}) == 5
    assert SRSTE().decay == 2e-4  # the authors' default (aojunzz/NM-sparsity, devkit/sparse_ops)


@EACH
def test_weights_rank_by_magnitude(method: Method) -> None:
    assert torch.equal(method.score(WEIGHT), WEIGHT.abs())
    assert torch.equal(magnitude_mask(method.score(WEIGHT), Pattern(2, 4), Axis(1)), KEEP)


@EACH
def test_inputs_are_left_as_they_were(method: Method) -> None:
    weight, keep = WEIGHT.clone(), KEEP.clone()
    method.score(weight).fill_(7)
    method.forward(weight, keep)
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(keep, KEEP)


# --- the equations -----------------------------------------------------------------------------------------------

EQUATIONS = [
    (ASP(), PRUNED, GRADIENT * KEEP),
    (Dense(), WEIGHT, GRADIENT),
    (SRSTE(0.5), PRUNED, GRADIENT),  # its decay is no part of the graph
    (STE(), PRUNED, GRADIENT),
    (TransposableSRSTE(0.5), PRUNED, GRADIENT),
]


@pytest.mark.parametrize(("method", "output", "gradient"), EQUATIONS, ids=lambda x: getattr(x, "name", ""))
def test_forward_and_gradient(method: Method, output: Tensor, gradient: Tensor) -> None:
    weight = WEIGHT.clone().requires_grad_()
    found = method.forward(weight, KEEP)
    found.backward(GRADIENT)
    assert torch.equal(found, output)
    assert torch.equal(weight.grad, gradient)


@SPARSE
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 8), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_exactly_n_of_m_survive(method: Method, n: int, m: int, groups: int, seed: int) -> None:
    pattern = Pattern(min(n, m), m)
    weight = torch.randint(1, 4, (3, groups * m), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    keep = magnitude_mask(method.score(weight), pattern, Axis(1))
    assert (kept_per_group(method.forward(weight, keep), pattern, Axis(1)) == pattern.n).all()


def test_only_sr_ste_has_a_gradient_term() -> None:
    names = [method.name for method in ALL if hasattr(method, "gradient_term")]
    assert names == ["sr-ste", "transposable-sr-ste"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sr_ste_term_is_decay_times_the_pruned_weights(dtype: torch.dtype, requires_grad: bool) -> None:
    weight, keep = WEIGHT.to(dtype).requires_grad_(requires_grad), KEEP.clone()
    term = SRSTE(0.25).gradient_term(weight, keep)
    assert term.tolist() == [[0.25, 0.0, 0.0, -0.5], [0.0, 0.0625, 0.0, 0.125]]
    assert term.dtype == dtype
    assert torch.equal(weight, WEIGHT.to(dtype))
    assert torch.equal(keep, KEEP)


def test_sr_ste_term_may_be_changed_in_place() -> None:
    weight = WEIGHT.clone()
    SRSTE(0.25).gradient_term(weight, KEEP).fill_(7)
    assert torch.equal(weight, WEIGHT)


# --- twenty steps of plain SGD, written out ----------------------------------------------------------------------

LR, STEPS = 0.05, 20


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield tuple(torch.randn(16, 8, generator=generator) for _ in range(2))  # type: ignore[misc]


def trained(method: Method) -> list[Tensor]:
    """The weight after each step of fitting y = x w~', with the method's term added as `attach` would."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    path = []
    for x, y in batches():
        keep = magnitude_mask(method.score(weight.detach()), Pattern(2, 4), Axis(1))
        (gradient,) = torch.autograd.grad(((x @ method.forward(weight, keep).t() - y) ** 2).mean(), weight)
        with torch.no_grad():
            if hasattr(method, "gradient_term"):
                gradient = gradient + method.gradient_term(weight, keep)
            weight -= LR * gradient
        path.append(weight.detach().clone())
    return path


def by_hand(decay: float) -> list[Tensor]:
    """The same of SR-STE without autograd: dL/dw~ = 2 (x w~' - y)' x / numel, plus decay * w where pruned."""
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    path = []
    for x, y in batches():
        order = w.abs().view(8, 2, 4).argsort(-1)
        pruned = torch.zeros(8, 2, 4).scatter_(-1, order[..., :2], 1.0).view(8, 8)
        g = 2 * (x @ (w * (1 - pruned)).t() - y).t() @ x / y.numel()
        w = w - LR * (g + decay * pruned * w)
        path.append(w)
    return path


@pytest.mark.parametrize("decay", [0.0, 0.5, 5.0])
def test_sr_ste_trains_as_its_equation_says(decay: float) -> None:
    for found, expected in zip(trained(SRSTE(decay)), by_hand(decay), strict=True):
        torch.testing.assert_close(found, expected)


def test_sr_ste_without_decay_is_ste() -> None:
    for found, expected in zip(trained(SRSTE(0.0)), trained(STE()), strict=True):
        assert torch.equal(found, expected)


def test_the_decay_matters() -> None:
    assert not torch.allclose(trained(SRSTE(0.5))[-1], trained(STE())[-1])


def test_asp_leaves_pruned_weights_alone() -> None:
    weight = WEIGHT.clone().requires_grad_()
    for _ in range(3):
        (gradient,) = torch.autograd.grad((ASP().forward(weight, KEEP) - GRADIENT).square().sum(), weight)
        with torch.no_grad():
            weight -= 0.1 * gradient
    assert torch.equal(weight[~KEEP], WEIGHT[~KEEP])
    assert (weight[KEEP] != WEIGHT[KEEP]).all()
