"""The decoupled decay: what shrinks, by how much, when, and once a step. Trajectories: test_trajectories.py."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pytest
import torch
from plain_loop import DECAY, Net, batches, keep_by_sorting
from torch import nn

import openwork as ow

X, Y = batches(1)[0]
LR = 0.25
METHOD = ow.SRSTE(decay=DECAY, decoupled=True)


def net(method=METHOD, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net().to(dtype)
    ow.sparsify(model, "2:4", method)
    return model


def dense(model):
    names = ("conv", "middle", "last")
    return {name: getattr(model, name).parametrizations.weight.original for name in names}


def backward(model, factor=1.0):
    dtype = next(model.parameters()).dtype
    loss = (model(X.to(dtype)) - Y.to(dtype)).square().mean() * factor
    loss.backward()
    return loss


def shrunk(model, rate=LR):
    """What the weights are after a step that has a gradient of 0."""
    weights = {name: weight.detach().clone() for name, weight in dense(model).items()}
    return {name: w - (rate * DECAY) * w.where(~keep_by_sorting(w), 0.0) for name, w in weights.items()}


def without_gradients(model):
    backward(model)
    for parameter in model.parameters():
        parameter.grad.zero_()


def equal(model, wanted, tolerance=1e-15):
    return all(torch.allclose(w, wanted[name].to(w.dtype), rtol=0, atol=tolerance) for name, w in dense(model).items())


OPTIMIZERS = [
    pytest.param(partial(kind, **{"lr": LR} | options), id=f"{kind.__name__} {options}")
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}, {"maximize": True})
] + [
    pytest.param(partial(torch.optim.AdamW, lr=torch.tensor(LR), weight_decay=0.0), id="tensor rate"),
    pytest.param(partial(torch.optim.AdamW, lr=torch.tensor([LR]), weight_decay=0.0), id="tensor rate, one dim"),
    pytest.param(partial(torch.optim.AdamW, lr=torch.tensor(LR), weight_decay=0.0, fused=True), id="fused tensor rate"),
    pytest.param(partial(torch.optim.NAdam, lr=LR), id="NAdam"),
    pytest.param(partial(torch.optim.Adadelta, lr=LR), id="Adadelta"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_pruned_weights_shrink_by_rate_times_decay_once(make, dtype):
    """Whatever updates the weights, and whichever way the gradient is turned."""
    model = net(dtype=dtype)
    optimizer = make(model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    handle = ow.attach(optimizer, model)
    without_gradients(model)
    wanted = shrunk(model)
    own = [(p, p.grad) for p in model.parameters()]
    optimizer.step()
    assert equal(model, wanted, 1e-15 if dtype == torch.float64 else 1e-7)
    assert all(p.grad is gradient and not gradient.any() for p, gradient in own)
    assert handle.steps == 1


def test_each_group_has_its_own_rate():
    model = net()
    first, *others = model.children()
    optimizer = torch.optim.SGD(
        [{"params": first.parameters(), "lr": 0.0}, *({"params": e.parameters()} for e in others)], LR
    )
    ow.attach(optimizer, model)
    without_gradients(model)
    wanted = shrunk(model) | {"conv": dense(model)["conv"].detach().clone()}
    optimizer.step()
    assert equal(model, wanted)


def test_a_scheduler_s_rate_is_the_one_of_the_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    ow.attach(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for rate in (LR, LR / 2, LR / 4):
        without_gradients(model)
        wanted = shrunk(model, rate)
        optimizer.step()
        scheduler.step()
        assert equal(model, wanted)


def test_the_moments_see_nothing_of_it():
    ends = []
    for method in (METHOD, ow.STE()):
        model = net(method)
        optimizer = torch.optim.Adam(model.parameters(), LR)
        ow.attach(optimizer, model)
        backward(model)
        optimizer.step()
        ends.append([optimizer.state[weight] for weight in dense(model).values()])
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_for_overflow_shrinks_nothing(fused):
    model = net(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=fused)
    handle = ow.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: w.detach().clone() for name, w in dense(model).items()}
    backward(model, scaler.scale(torch.tensor(float("inf"))))
    scaler.step(optimizer)
    assert equal(model, before, 0.0)
    assert handle.steps == 0


def test_weights_without_a_gradient_stay():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    ow.attach(optimizer, model)
    without_gradients(model)
    dense(model)["middle"].grad = None
    wanted = shrunk(model) | {"middle": dense(model)["middle"].detach().clone()}
    optimizer.step()
    assert equal(model, wanted)


class CallsThrice(torch.optim.Optimizer):
    """Evaluates its closure three times a step, and changes nothing."""

    def __init__(self, params):
        super().__init__(params, {"lr": LR})

    def step(self, closure):
        for _ in range(3):
            closure()


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_that_is_called_often_shrinks_once(by_keyword):
    model = net()
    optimizer = CallsThrice(model.parameters())
    handle = ow.attach(optimizer, model)
    for steps in (1, 2):
        wanted, seen = shrunk(model), []

        def closure(seen=seen):
            seen.append(dense(model)["conv"].detach().clone())
            model.zero_grad()
            backward(model)

        before = dense(model)["conv"].detach().clone()
        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert torch.equal(seen[0], before)  # as AdamW: the first evaluation is of the weights as they were
        assert equal(model, wanted)
        assert handle.steps == steps


def test_lbfgs_shrinks_once_in_a_step():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=LR, max_iter=4)
    ow.attach(optimizer, model)
    wanted, calls = shrunk(model), []

    def closure():
        calls.append(1)
        model.zero_grad()
        loss = backward(model) * 0
        for parameter in model.parameters():
            parameter.grad.mul_(0).add_(1e-12)
        return loss

    optimizer.step(closure)
    assert calls
    assert equal(model, wanted, 1e-9)


def test_the_mask_is_that_of_the_forward():
    """bfloat16 autocast saw ties: the first two were kept."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.001, 1.002, 1.003]]))
    ow.sparsify(model, "2:4", METHOD)
    weight = model[0].parametrizations.weight.original
    optimizer = torch.optim.SGD(model.parameters(), LR)
    ow.attach(optimizer, model)
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    factor = 1 - LR * DECAY
    assert weight.tolist()[0] == pytest.approx([factor, 1.001 * factor, 1.002, 1.003])


@dataclass(frozen=True)
class StoredMasks(ow.Method):
    """Masks that stay, and a decoupled decay: what a method states is all the engine needs."""

    decay: float = DECAY
    decoupled: bool = True
    schedule: ow.methods.Schedule = field(default=ow.methods.Schedule(refresh_every=2))
    name: ClassVar[str] = "stored"


def test_a_method_of_one_s_own_with_stored_masks():
    model = net(StoredMasks())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    ow.attach(optimizer, model)
    masks = ow.masks(model)
    without_gradients(model)
    wanted = {name: w.detach() - LR * DECAY * w.detach() * ~masks[f"{name}.weight"] for name, w in dense(model).items()}
    optimizer.step()
    assert equal(model, wanted)


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


def test_an_optimizer_without_a_rate_is_refused():
    model = net()
    with pytest.raises(
        ValueError, match="NoRate has parameter groups without 'lr', which the decoupled decay of SRSTE"
    ):
        ow.attach(NoRate(model.parameters()), model)


def test_what_a_method_says_of_itself():
    assert repr(ow.SRSTE(0.5)) == "SRSTE(decay=0.5)"
    assert repr(METHOD) == "SRSTE(decay=0.5, decoupled=True)"
    assert ow.SRSTE(DECAY) != METHOD
