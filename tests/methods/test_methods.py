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

from openwork.methods import (
    ASP,
    METHODS,
    SRSTE,
    SSTE,
    STE,
    STEP,
    Dense,
    MaxQ,
    MdGf,
    Method,
    Phase,
    SdGf,
    TransposableSRSTE,
)
from openwork.methods.autograd import masked
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group
from openwork.nm.pattern import Pattern
from openwork.ops.masks import add_decay

torch.set_num_threads(1)

ALL = [ASP(), Dense(), MaxQ(8), MdGf(8), SdGf(8), SRSTE(), SSTE(), STE(), STEP(8), TransposableSRSTE()]
EACH = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
SPARSE = pytest.mark.parametrize("method", [method for method in ALL if method.sparse], ids=lambda method: method.name)

WEIGHT = torch.tensor([[1.0, -4.0, 3.0, -2.0], [0.5, 0.25, -0.75, 0.5]])
KEEP = torch.tensor([[False, True, True, False], [True, False, True, False]])  # 2:4 by magnitude
PRUNED = torch.tensor([[0.0, -4.0, 3.0, 0.0], [0.5, 0.0, -0.75, 0.0]])
PHASE = Phase(Pattern(2, 4), Axis(1))
GRADIENT = torch.tensor([[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]])


# --- the protocol ------------------------------------------------------------------------------------------------


@EACH
def test_is_a_method(method: Method) -> None:
    assert isinstance(method, Method)
    assert not isinstance(type("Nothing", (), {"name": "nothing"})(), Method)


def test_names_are_the_field_s() -> None:
    assert {method.name: (method.sparse, method.schedule.refresh_every) for method in ALL} == {
        "asp": (True, None),
        "dense": (False, 0),
        "maxq": (True, 0),
        "mdgf": (True, 0),
        "sdgf": (True, 0),
        "s-ste": (True, 0),
        "sr-ste": (True, 0),
        "ste": (True, 0),
        "step": (True, 0),
        "transposable-sr-ste": (True, 40),
    }


def test_every_method_is_in_the_list_under_its_name() -> None:
    assert [*METHODS][:5] == ["dense", "asp", "ste", "sr-ste", "transposable-sr-ste"]
    assert all(method.name == name and issubclass(method, Method) for name, method in METHODS.items())
    assert {type(method) for method in ALL} == {*METHODS.values()}  # the tests below are for each of them


@EACH
def test_is_a_frozen_value(method: Method) -> None:
    twin = type(method)(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
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
    assert torch.equal(method.score(WEIGHT, {}), WEIGHT.abs())
    assert torch.equal(method.mask(method.score(WEIGHT, {}), PHASE), KEEP)


@EACH
def test_inputs_are_left_as_they_were(method: Method) -> None:
    weight, keep = WEIGHT.clone(), KEEP.clone()
    method.score(weight, {}).fill_(7)
    method.forward(weight, keep, PHASE, method.state(weight, PHASE))
    method.backward(GRADIENT.clone(), keep, PHASE, {})
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(keep, KEEP)


# --- the equations -----------------------------------------------------------------------------------------------

EQUATIONS = [
    (ASP(), PRUNED, GRADIENT * KEEP),
    (Dense(), WEIGHT, GRADIENT),
    (SRSTE(0.5), PRUNED, GRADIENT),  # its decay is no part of the graph
    (SSTE(), torch.tensor([[0.0, -2.0, 1.0, 0.0], [0.0, 0.0, -0.25, 0.0]]), GRADIENT),  # by a scale of 1
    (STE(), PRUNED, GRADIENT),
    (TransposableSRSTE(0.5), PRUNED, GRADIENT),
]


@pytest.mark.parametrize(("method", "output", "gradient"), EQUATIONS, ids=lambda x: getattr(x, "name", ""))
def test_forward_and_gradient(method: Method, output: Tensor, gradient: Tensor) -> None:
    weight = WEIGHT.clone().requires_grad_()
    found = masked(method, weight, KEEP, PHASE, {"scale": torch.ones(())})
    found.backward(GRADIENT)
    assert torch.equal(found, output)
    assert torch.equal(weight.grad, gradient)


@SPARSE
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 8), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_exactly_n_of_m_survive(method: Method, n: int, m: int, groups: int, seed: int) -> None:
    pattern = Pattern(min(n, m), m)
    weight = torch.randint(1, 4, (3, groups * m), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    phase = Phase(pattern, Axis(1))
    keep = method.mask(method.score(weight, {}), phase)
    kept = kept_per_group(method.forward(weight, keep, phase, method.state(weight, phase)), pattern, Axis(1))
    assert ((kept <= pattern.n) if method == SSTE() else (kept == pattern.n)).all()


def test_only_sr_ste_has_a_decay() -> None:
    assert [method.name for method in ALL if method.decay] == ["maxq", "sr-ste", "transposable-sr-ste"]
    assert [method.name for method in ALL if method.acts_in_step] == [
        "maxq",
        "mdgf",
        "sdgf",
        "sr-ste",
        "step",
        "transposable-sr-ste",
    ]
    assert not SRSTE(0.0).acts_in_step
    assert TransposableSRSTE(0.0).acts_in_step  # its masks are chosen anew


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_sr_ste_adds_decay_times_the_pruned_weights(dtype: torch.dtype, requires_grad: bool) -> None:
    weight, keep = WEIGHT.to(dtype).requires_grad_(requires_grad), KEEP.clone()
    gradient = torch.zeros_like(weight).detach()
    with torch.no_grad():
        add_decay(gradient, weight, SRSTE(0.25).decay, keep)
    assert gradient.tolist() == [[0.25, 0.0, 0.0, -0.5], [0.0, 0.0625, 0.0, 0.125]]
    assert torch.equal(weight, WEIGHT.to(dtype))
    assert torch.equal(keep, KEEP)


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
        keep = method.mask(method.score(weight.detach(), {}), PHASE)
        used = masked(method, weight, keep, PHASE, {})
        (gradient,) = torch.autograd.grad(((x @ used.t() - y) ** 2).mean(), weight)
        with torch.no_grad():
            gradient = gradient + method.decay * weight * ~keep
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
        (gradient,) = torch.autograd.grad((masked(ASP(), weight, KEEP, PHASE, {}) - GRADIENT).square().sum(), weight)
        with torch.no_grad():
            weight -= 0.1 * gradient
    assert torch.equal(weight[~KEEP], WEIGHT[~KEEP])
    assert (weight[KEEP] != WEIGHT[KEEP]).all()
