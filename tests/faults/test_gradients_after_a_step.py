"""A step leaves `weight.grad` to the user: the term is for the optimizer alone, and has the optimizer's sign."""

from functools import partial

import pytest
import torch
from torch import nn

import openwork as ow

DECAY = 0.5
D = torch.float64


def net(method=ow.SRSTE(DECAY), dtype=D):  # noqa: B008
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 4, dtype=dtype))
    ow.sparsify(model, "2:4", method)
    return model


def dense(model):
    return [model[i].parametrizations.weight.original for i in (0, 2)]


def backward(model, factor=1.0):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1), dtype=D)
    (model(x.to(dense(model)[0].dtype)).square().mean() * factor).backward()


def pruned(model):
    return [~mask for mask in ow.masks(model).values()]


OPTIMIZERS = {
    f"{kind.__name__} {options}": partial(kind, **{"lr": 0.01} | options)
    for kind in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.RMSprop,
        torch.optim.Adadelta,
        torch.optim.Adafactor,
    )
    for options in ({}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.1})
    if not ("fused" in options and kind.__name__ not in ("SGD", "Adam", "AdamW", "Adagrad"))
}
MAXIMIZING = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adafactor,
]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_are_the_tensors_that_they_were(make):
    model = net()
    optimizer = make(model.parameters())
    ow.attach(optimizer, model)
    backward(model)
    own = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    for _ in range(2):
        optimizer.step()
        assert all(p.grad is gradient and torch.equal(gradient, before) for p, gradient, before in own)


def test_two_steps_on_one_gradient_add_the_term_twice_to_the_weight_alone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    backward(model)
    wanted = [w.detach().clone() for w in dense(model)]
    for _ in range(2):
        wanted = [
            w - 0.1 * (p.grad + DECAY * w * mask)
            for w, p, mask in zip(wanted, dense(model), pruned(model), strict=True)
        ]
        optimizer.step()
    assert all(torch.allclose(w, p, atol=1e-14) for w, p in zip(wanted, dense(model), strict=True))


def test_gradients_that_accumulate_over_steps_hold_no_term():
    """Without `zero_grad`, and with gradients zeroed in place."""
    ends = []
    for method in (ow.STE(), ow.SRSTE(DECAY)):
        model = net(method)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ow.attach(optimizer, model)
        for _ in range(3):
            backward(model)
            optimizer.step()
        own = [p.grad for p in model.parameters()]
        ends.append([gradient.clone() for gradient in own])
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is each for p, each in zip(model.parameters(), own, strict=True))
        assert not any(gradient.any() for gradient in own)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [1024.0, 1000.0])
@pytest.mark.parametrize("factor", [1.0, float("inf")])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_under_a_scaler_gradients_are_as_without_the_term(kind, factor, scale, fused):
    """A fused optimizer divides gradients by the scale in place; one that skips a step leaves them."""
    ends = []
    for method in (ow.STE(), ow.SRSTE(DECAY)):
        model = net(method, torch.float32)
        optimizer = kind(model.parameters(), lr=0.0, fused=fused)
        ow.attach(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        backward_scaled(model, scaler, factor)
        own = [p.grad for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad is gradient for p, gradient in zip(model.parameters(), own, strict=True))
        ends.append(own)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*ends, strict=True))


def backward_scaled(model, scaler, factor):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    scaler.scale(model(x).square().mean() * factor).backward()


def test_a_gradient_that_two_weights_share_stays_shared():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    weights = [layer.parametrizations.weight.original for layer in model]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    ow.attach(optimizer, model)
    shared = torch.zeros(8, 8)
    for weight in weights:
        weight.grad = shared
    wanted = [w.detach() - DECAY * w.detach() * mask for w, mask in zip(weights, pruned(model), strict=True)]
    optimizer.step()
    assert all(weight.grad is shared for weight in weights)
    assert not shared.any()
    assert all(torch.allclose(w, p) for w, p in zip(wanted, weights, strict=True))


def test_views_of_one_buffer_and_expanded_gradients_stay():
    """As DDP and flat buffers hold them; an expanded one cannot be written to."""
    model = net()
    buffer = torch.randn(16 * 8 + 8 * 4, dtype=D)
    before = buffer.clone()
    first, second = dense(model)
    first.grad, second.grad = buffer[:128].view(8, 16), buffer[128:].view(4, 8)
    optimizer = torch.optim.SGD(dense(model), lr=0.1)
    ow.attach(optimizer, model)
    optimizer.step()
    assert torch.equal(buffer, before)
    assert first.grad.data_ptr() == buffer.data_ptr()
    first.grad = torch.ones(1, 1, dtype=D).expand(8, 16)
    optimizer.step()
    assert first.grad.stride() == (0, 0)


def test_none_stays_none():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        raise ValueError("after the update")


def user_hook(optimizer, *_):
    raise ValueError("in a hook")


@pytest.mark.parametrize("scheduler", ["none", "before", "after"])
@pytest.mark.parametrize("where", ["step", "pre-hook", "post-hook"])
def test_a_step_that_raises_leaves_gradients_as_they_were(where, scheduler):
    model = net()
    optimizer = (Failing if where == "step" else torch.optim.SGD)(model.parameters(), lr=0.1)
    if scheduler == "before":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    handle = ow.attach(optimizer, model)
    if scheduler == "after":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if where == "pre-hook":
        optimizer.register_step_pre_hook(user_hook)
    if where == "post-hook":
        optimizer._optimizer_step_post_hooks[-1] = user_hook
        optimizer._optimizer_step_post_hooks.move_to_end(-1, last=False)
    backward(model)
    own = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"after the update|in a hook"):
        optimizer.step()
    assert all(p.grad is gradient and torch.equal(gradient, before) for p, gradient, before in own)
    handle.detach()
    assert "_openwork_hooks" not in vars(optimizer)


def test_a_closure_sees_the_gradients_that_it_made():
    """One that does not zero them accumulates them, without the terms; one that raises leaves what it has made."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.0, max_iter=3, tolerance_grad=0, tolerance_change=-1)
    ow.attach(optimizer, model)
    backward(model)
    (once, *_) = [w.grad.clone() for w in dense(model)]
    model.zero_grad()
    calls = []

    def closure():
        backward(model)
        calls.append(1)
        assert torch.allclose(dense(model)[0].grad, len(calls) * once)
        if len(calls) == 5:
            raise ValueError("enough")
        return torch.zeros(())

    optimizer.step(closure)
    assert len(calls) == 3
    assert torch.allclose(dense(model)[0].grad, 3 * once)
    with pytest.raises(ValueError, match="enough"):
        optimizer.step(closure)
    assert torch.allclose(dense(model)[0].grad, 5 * once)


class Frees(torch.optim.SGD):
    """Frees gradients as it goes."""

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


def test_gradients_that_the_optimizer_frees_are_free():
    model = net()
    optimizer = Frees(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    backward(model)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


class WritesTheGradient(ow.SRSTE):
    def before_step(self, optimizer, weights):
        for each in weights:
            each.weight.grad.mul_(2)


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_what_a_method_writes_is_for_the_optimizer_too(decay):
    model = net(WritesTheGradient(decay))
    optimizer = torch.optim.SGD(dense(model), lr=1.0)
    ow.attach(optimizer, model)
    backward(model)
    before = [w.grad.clone() for w in dense(model)]
    wanted = [
        w.detach() - 2 * (g + decay * w.detach() * mask)
        for w, g, mask in zip(dense(model), before, pruned(model), strict=True)
    ]
    optimizer.step()
    assert all(torch.equal(w.grad, g) for w, g in zip(dense(model), before, strict=True))
    assert all(torch.allclose(w, end, atol=1e-14) for w, end in zip(dense(model), wanted, strict=True))


# --- maximize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAXIMIZING)
@pytest.mark.parametrize("method", [ow.SRSTE(DECAY), ow.TransposableSRSTE(DECAY, refresh_every=2)], ids=str)
def test_maximizing_the_negative_is_minimizing(kind, method):
    ends = []
    for maximize in (False, True):
        model = net(method)
        optimizer = kind(model.parameters(), lr=0.01, maximize=maximize)
        ow.attach(optimizer, model)
        for _ in range(5):
            optimizer.zero_grad()
            backward(model, -1.0 if maximize else 1.0)
            optimizer.step()
        ends.append(dense(model))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*ends, strict=True))


def test_each_group_has_its_own_sign():
    ends = []
    for maximize in (False, True):
        model = net()
        first, second = dense(model)
        groups = [{"params": [first]}, {"params": [second], "maximize": maximize}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        ow.attach(optimizer, model)
        backward(model)
        if maximize:
            second.grad.neg_()
        optimizer.step()
        ends.append(dense(model))
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("fused", [True])
def test_a_scaled_fused_step_that_maximizes_shrinks(fused):
    model = net(dtype=torch.float32)
    optimizer = torch.optim.SGD(dense(model), lr=1.0, maximize=True, fused=fused)
    ow.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.zeros(1, 16)).sum() * 0).backward()
    wanted = [w.detach() * (1 - DECAY * mask.float()) for w, mask in zip(dense(model), pruned(model), strict=True)]
    scaler.step(optimizer)
    assert all(torch.allclose(w, end) for w, end in zip(dense(model), wanted, strict=True))


class Zeroing(torch.optim.Optimizer):
    """Descends, and zeroes its gradients in place at the end of each step."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)
        self.zero_grad(set_to_none=False)


def test_gradients_that_the_step_zeroes_are_zero():
    model = net()
    optimizer = Zeroing(model.parameters())
    ow.attach(optimizer, model)
    for _ in range(2):
        backward(model)
        own = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is grad and not grad.any() for p, grad in zip(model.parameters(), own, strict=True))
