"""That the shape of a method fits what others will write: state for each weight, patterns that tighten, hooks of the
optimizer step that edit weights, moments and the schedule's clock. The methods here are those of papers, cut short."""

import copy
import io
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

import openwork as ow
from openwork.methods import Method, Schedule
from openwork.nm.groups import Axis, from_rows, to_rows
from openwork.nm.masks import kept_per_group

torch.set_num_threads(1)

TWO_OF_FOUR = ow.Pattern(2, 4)


@dataclass(frozen=True)
class SSTE(Method):
    """Soft threshold at the (M-N)th smallest magnitude, times a scale that is found once (arXiv:2409.09099)."""

    name: ClassVar[str] = "s-ste"
    elementwise: ClassVar[bool] = False

    def state(self, weight, phase):
        soft = soft_threshold(weight, phase)
        norm = soft.square().sum()
        return {"scale": torch.where(norm > 0, (weight * soft).sum() / norm, 1.0).to(weight.dtype)}

    def forward(self, weight, mask, phase, state):
        return state["scale"] * soft_threshold(weight, phase)


def soft_threshold(weight, phase):
    n, m = phase.pattern.n, phase.pattern.m
    if n == m:
        return weight.clone()
    rows = to_rows(weight, phase.axis)
    groups = functional.pad(rows, (0, -rows.shape[-1] % m)).unflatten(-1, (-1, m))
    threshold = groups.abs().kthvalue(m - n, dim=-1, keepdim=True).values
    soft = torch.where(groups.abs() > threshold, groups - groups.sign() * threshold, 0.0)
    return from_rows(soft.flatten(-2)[..., : rows.shape[-1]], phase.axis, tuple(weight.shape))


@dataclass(frozen=True)
class Tightening(Schedule):
    """3:4, then 2:4 (SdGf of arXiv:2402.04744)."""

    def at(self, step, end):
        return replace(end, pattern=ow.Pattern(3, 4))


@dataclass(frozen=True)
class SdGf(Method):
    refresh_every: int = 0
    name: ClassVar[str] = "sdgf"

    @property
    def schedule(self):
        return Tightening(steps=3, refresh_every=self.refresh_every)


@dataclass(frozen=True)
class AST(Method):
    """SR-STE's decay beside the optimizer's moments."""

    name: ClassVar[str] = "ast"

    def after_step(self, optimizer, weights):
        with torch.no_grad():
            for each in weights:
                each.weight -= 0.5 * each.weight * ~each.mask()


@dataclass(frozen=True)
class Dense1(Schedule):
    def at(self, step, end):
        return replace(end, pattern=ow.Pattern(4, 4))


@dataclass(frozen=True)
class STEP(Method):
    """Dense until a hook decides, from the second moments, that the clock jumps to the end (arXiv:2302.01172)."""

    name: ClassVar[str] = "step"

    @property
    def schedule(self):
        return Dense1(steps=100)

    def state(self, weight, phase):
        return {"second": torch.zeros_like(weight)}

    def before_step(self, optimizer, weights):
        for each in weights:
            each.state["second"].copy_(optimizer.state[each.weight].get("exp_avg_sq", torch.zeros(())))

    def after_step(self, optimizer, weights):
        for each in weights:
            v = optimizer.state[each.weight]["exp_avg_sq"]
            if each.step >= 3 and each.step < 100 and not torch.equal(v, each.state["second"]):
                each.step = 100
            if each.step > 100:
                v.copy_(each.state["second"])  # frozen


def net(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    ow.sparsify(model, "2:4", method)
    return model


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - 3).square().mean().backward()
        optimizer.step()


def adam(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return optimizer, ow.attach(optimizer, model)


def latent(model):
    return model[0].parametrizations.weight.original


@pytest.mark.parametrize("method", [SSTE(), SdGf(), SdGf(refresh_every=2), AST(), STEP()], ids=str)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(method):
    whole, model, resumed = net(method), net(method), net(method)
    train(whole, adam(whole)[0], 0, 7)
    optimizer, _ = adam(model)
    train(model, optimizer, 0, 3)
    torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
    file.seek(0)
    optimizer, _ = adam(resumed)
    with torch.no_grad():
        latent(resumed).add_(1)  # so that nothing is right by chance
    state, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, 3, 7)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
    ow.verify(resumed)


def test_state_is_saved_beside_the_weight_and_folded(tmp_path):
    model, x = net(SSTE()), torch.randn(2, 8, dtype=torch.float64)
    scale = model.state_dict()["0.weight_scale"]
    assert model[0].weight_scale is model[0].parametrizations.weight[0].state["scale"]
    assert float(scale) > 1
    before = model(x)
    assert int(kept_per_group(model[0].weight, TWO_OF_FOUR, Axis(1)).max()) == 2
    ow.verify(model, x)
    ow.save(model, tmp_path / "net.safetensors")
    twin = ow.finalize(copy.deepcopy(model))
    assert torch.equal(twin(x), before)
    assert torch.equal(ow.load_state_dict(tmp_path / "net.safetensors")["0.weight"], twin[0].weight)
    assert "0.weight_scale" not in twin.state_dict()
    assert torch.equal(model.state_dict()["0.weight_scale"], scale)


def test_a_dense_checkpoint_makes_the_state_anew():
    model, other = net(SSTE()), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with pytest.warns(UserWarning, match="what the method keeps was made anew, from its weights"):
        model.load_state_dict(other.state_dict())
    ow.sparsify(other, "2:4", SSTE())
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_the_gradient_passes_as_if_there_were_no_formula():
    model = net(SSTE())
    model[0].weight.sum().backward()
    assert torch.equal(latent(model).grad, torch.ones(8, 8).double())


@pytest.mark.parametrize("refresh_every", [0, 2, 100])
def test_a_pattern_tightens(refresh_every):
    model = net(SdGf(refresh_every))
    optimizer, handle = adam(model)
    for step in range(5):
        kept = kept_per_group(model[0].weight, TWO_OF_FOUR, Axis(1))
        assert kept.unique().tolist() == [3 if step < 3 else 2]
        assert handle.unfinished == (f"pattern 3:4: not yet 2:4 (step {step} of 3)" if step < 3 else "")
        train(model, optimizer, step, step + 1)
    ow.verify(model)


def test_a_hook_after_the_step_sees_the_masks_and_writes_weights():
    model, plain = net(AST()), net(ow.STE())
    optimizer, _ = adam(model)
    train(plain, adam(plain)[0], 0, 1)
    train(model, optimizer, 0, 1)
    for sparse, other in zip((model[0], model[2]), (plain[0], plain[2]), strict=True):
        weight = other.parametrizations.weight.original
        assert torch.equal(sparse.parametrizations.weight.original, torch.where(other.weight != 0, weight, weight / 2))


def test_hooks_edit_moments_and_move_the_clock():
    model = net(STEP())
    optimizer, handle = adam(model)
    train(model, optimizer, 0, 2)
    assert handle.unfinished == "pattern 4:4: not yet 2:4 (step 2 of 100)"
    train(model, optimizer, 2, 3)
    assert handle.unfinished == ""
    ow.verify(model)
    frozen = optimizer.state[latent(model)]["exp_avg_sq"].clone()
    train(model, optimizer, 3, 6)
    assert torch.equal(optimizer.state[latent(model)]["exp_avg_sq"], frozen)


def test_hooks_are_called_for_what_the_optimizer_trains():
    model = net(AST())
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
    ow.attach(optimizer, model)
    before = latent(model).clone()
    train(model, optimizer, 0, 1)
    assert torch.equal(latent(model), before)


# --- what a method may not do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [{"mask": torch.ones(1)}, {"step": torch.ones(1)}, {"scale": 1.0}], ids=str)
def test_state_is_tensors_under_names_of_its_own(state):
    @dataclass(frozen=True)
    class Wrong(Method):
        name: ClassVar[str] = "wrong"

        def state(self, weight, phase):
            return state

    with pytest.raises(ValueError, match=f"state returned '{next(iter(state))}'.*needed a tensor for each name"):
        ow.sparsify(nn.Linear(8, 8), "2:4", Wrong())


@pytest.mark.parametrize(("pattern", "inputs"), [("4:4", 8), ("2:4", 6), ("1:4", 7)])
def test_a_forward_over_groups_takes_any_pattern_and_short_groups(pattern, inputs):
    model = nn.Linear(inputs, 3)
    nn.init.zeros_(model.bias)
    ow.sparsify(model, ow.Selection(pattern, remainder="pad"), SSTE())
    assert model.weight.isfinite().all()
    pattern = ow.Pattern.parse(pattern)
    assert ow.verify(model).sparse == ({} if pattern.is_dense else {"weight": pattern})


def test_a_method_may_require_its_decay_and_hold_what_is_not_hashable():
    @dataclass(frozen=True)
    class Mine(Method):
        rates: dict
        decay: float
        name: ClassVar[str] = "mine"

        def before_step(self, optimizer, weights):
            self.rates["weights"] = len(weights)

    methods = [Mine({}, 0.5), Mine({}, 0.5)]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer, method in zip(model, methods, strict=True):
        ow.sparsify(layer, "2:4", method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert [method.rates for method in methods] == [{"weights": 1}, {"weights": 1}]


def test_stored_masks_of_a_dense_checkpoint_are_ranked_by_its_own_state():
    @dataclass(frozen=True)
    class ByStart(Method):
        name: ClassVar[str] = "by-start"
        schedule = Schedule(refresh_every=None)

        def state(self, weight, phase):
            return {"start": weight.abs()}

        def score(self, weight, state):
            return state["start"]

    dense, model = nn.Linear(8, 8), nn.Linear(8, 8)
    ow.sparsify(model, "2:4", ByStart())
    with pytest.warns(UserWarning, match="the checkpoint is dense"):
        model.load_state_dict(dense.state_dict())
    ow.sparsify(dense, "2:4", ByStart())
    assert torch.equal(ow.masks(model)["weight"], ow.masks(dense)["weight"])


def test_state_does_not_move_with_the_weight():
    @dataclass(frozen=True)
    class Start(Method):
        name: ClassVar[str] = "start"

        def state(self, weight, phase):
            return {"start": weight}

    model = nn.Linear(8, 8)
    ow.sparsify(model, "2:4", Start())
    before = model.state_dict()["weight_start"].clone()
    with torch.no_grad():
        model.parametrizations.weight.original.add_(1)
    assert torch.equal(model.state_dict()["weight_start"], before)
