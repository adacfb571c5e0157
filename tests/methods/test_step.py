"""STEP: both phases against Adam written out, the step at which they change, and what leaves no trace."""

import io
from functools import partial

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask

torch.set_num_threads(1)

LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.8), 1e-3, 0.1
METHOD = ow.STEP(10, earliest=2, window=4)
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, weight_decay=0.0),
    "adam, L2": partial(torch.optim.Adam, weight_decay=DECAY),
    "adamw": partial(torch.optim.AdamW, weight_decay=DECAY),
    "adamw, fused": partial(torch.optim.AdamW, weight_decay=DECAY, fused=True),
    "maximize": partial(torch.optim.AdamW, weight_decay=DECAY, maximize=True),
    "a tensor for lr": partial(torch.optim.AdamW, weight_decay=DECAY),
}


def net(seed=0, dtype=torch.float64, method=METHOD):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    ow.sparsify(model, "2:4", method)
    return model


def optimizer_of(model, kind="adamw", eps=EPS):
    lr = torch.tensor(LR, dtype=torch.float64) if kind == "a tensor for lr" else LR
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=lr, betas=BETAS, eps=eps)
    return optimizer, ow.attach(optimizer, model)


def batches(start, stop, dtype=torch.float64):
    return [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)).to(dtype) / 10 for i in range(start, stop)]


def train(model, optimizer, data, sign=1):
    for x in data:
        optimizer.zero_grad()
        (sign * (model(x) - x[:, :4]).square().mean()).backward()
        optimizer.step()


def latent(model):
    return [model[i].parametrizations.weight.original for i in (0, 2)]


def by_hand(data, method, kind, eps=EPS):
    """Weights, their second moments, and the step after which they were frozen, from the paper's algorithm."""
    plain = net(method=ow.STE())
    parameters = [*(w.detach().clone() for w in latent(plain)), *(plain[i].bias.detach().clone() for i in (0, 2))]
    m, v = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    changes, frozen = [], None
    wd = 0.0 if kind == "adam" else DECAY
    for t, x in enumerate(data, 1):
        used = [p.clone() for p in parameters]
        if frozen is not None:
            used[:2] = [w * magnitude_mask(w.abs(), ow.Pattern(2, 4), Axis(1)) for w in parameters[:2]]
        leaves = [each.requires_grad_() for each in used]
        y = nn.functional.linear(nn.functional.linear(x, leaves[0], leaves[2]).tanh(), leaves[1], leaves[3])
        gradients = torch.autograd.grad((y - x[:, :4]).square().mean(), leaves)
        moved, count = 0.0, 0
        for i, g in enumerate(gradients):
            if kind == "adam, L2":
                g = g + wd * parameters[i]
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            sparse = i < 2
            if frozen is None or not sparse:
                before, v[i] = v[i], BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
                if sparse:
                    moved, count = moved + float((v[i] - before).abs().sum()), count + g.numel()
                divisor = (v[i] / (1 - BETAS[1] ** t)).sqrt() + eps
            else:
                divisor = v[i].sqrt() + eps**0.75
            if kind != "adam, L2":
                parameters[i] = parameters[i] - LR * wd * parameters[i]
            parameters[i] = parameters[i] - LR * m[i] / (1 - BETAS[0] ** t) / divisor
        if frozen is None:
            changes.append(moved / count)
            last = changes[-method.window :]
            settled = len(last) == method.window and t > method.earliest and sum(last) / len(last) < eps
            frozen = t if settled or t == method.steps else None
    return parameters, v, frozen


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trains_as_its_equations_say(kind):
    model = net()
    optimizer, _ = optimizer_of(model, kind)
    train(model, optimizer, batches(0, 14), sign=-1 if kind == "maximize" else 1)
    parameters, v, frozen = by_hand(batches(0, 14), METHOD, kind)
    assert frozen == 4  # the first step at which there are four
    found = [*latent(model), model[0].bias, model[2].bias]
    for parameter, expected, second in zip(found, parameters, v, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], second, rtol=1e-11, atol=1e-15)
        assert float(optimizer.state[parameter]["step"]) == 14
    ow.verify(model)


@pytest.mark.parametrize(
    ("method", "eps", "expected"),
    [
        (ow.STEP(10, earliest=2, window=4), 1e-3, 4),
        (ow.STEP(10, earliest=7, window=4), 1e-3, 8),
        (ow.STEP(10, earliest=2, window=6), 1e-3, 6),
        (ow.STEP(10, earliest=2, window=50), 1e-3, 10),  # a window that is never full
        (ow.STEP(10, earliest=2, window=4), 1e-12, 10),  # moments that do not settle
        (ow.STEP(15, window=1), 1e-3, 4),  # a fifth of the steps
    ],
    ids=str,
)
def test_it_changes_when_the_moments_have_settled(method, eps, expected):
    model = net(method=method)
    optimizer, handle = optimizer_of(model, eps=eps)
    for step, x in enumerate(batches(0, 12), 1):
        train(model, optimizer, [x])
        assert bool(handle.unfinished) == (step < expected)
    if method.earliest:
        assert by_hand(batches(0, 12), method, "adamw", eps)[2] == expected


def test_the_second_moment_is_frozen_to_the_bit_and_gradients_stay():
    model = net()
    optimizer, _ = optimizer_of(model)
    train(model, optimizer, batches(0, 4))
    frozen = [optimizer.state[w]["exp_avg_sq"].clone() for w in latent(model)]
    train(model, optimizer, batches(4, 9))
    assert all(torch.equal(optimizer.state[w]["exp_avg_sq"], v) for w, v in zip(latent(model), frozen, strict=True))
    x = batches(9, 10)[0]
    gradients = torch.autograd.grad((model(x) - x[:, :4]).square().mean(), latent(model))
    train(model, optimizer, [x])
    assert all(torch.equal(w.grad, g) for w, g in zip(latent(model), gradients, strict=True))


@pytest.mark.parametrize("stop", [2, 4, 8])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(stop):
    whole, model, resumed = net(), net(), net(seed=1)
    train(whole, optimizer_of(whole)[0], batches(0, 12))
    optimizer, _ = optimizer_of(model)
    train(model, optimizer, batches(0, stop))
    torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
    file.seek(0)
    optimizer, handle = optimizer_of(resumed)
    state, moments = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(moments)
    assert bool(handle.unfinished) == (stop < 4)
    train(resumed, optimizer, batches(stop, 12))
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("kind", ["adamw", "adamw, fused"])
def test_skipped_steps_and_micro_batches_leave_no_trace(kind):
    model, plain = net(), net()
    train(plain, optimizer_of(plain)[0], batches(0, 9))
    optimizer, handle = optimizer_of(model, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, x in enumerate(batches(0, 9)):
        for wrong in (*[torch.inf] * (step in (1, 6)), *[1.0]):
            optimizer.zero_grad()
            for part in x.chunk(2):
                scaler.scale((model(part) - part[:, :4]).square().mean() / 2 * wrong).backward()
            scaler.step(optimizer)
            scaler.update()
    assert handle.steps == 9
    for found, expected in zip(latent(model), latent(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_weights_without_a_gradient_are_left_alone():
    model = net()
    optimizer, _ = optimizer_of(model)
    train(model, optimizer, batches(0, 5))
    before = latent(model)[0].detach().clone()
    optimizer.zero_grad()
    model[2](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert torch.equal(latent(model)[0], before)


def test_what_cannot_be_is_refused():
    for make, said in (
        (partial(torch.optim.SGD, lr=0.1), "SGD; needed torch.optim.Adam or AdamW"),
        (partial(torch.optim.Adam, amsgrad=True), "Adam with amsgrad; needed"),
        (torch.optim.RAdam, "RAdam; needed"),
    ):
        model = net()
        with pytest.raises(ValueError, match=said):
            ow.attach(make(model.parameters()), model)
    for options in ({"steps": 0}, {"steps": 5, "window": 0}, {"steps": 5, "earliest": -1}):
        with pytest.raises(ValueError, match="needed a number of optimizer steps"):
            ow.STEP(**options)


def test_sparse_steps_need_the_moments_of_the_dense_ones():
    model = net()
    train(model, optimizer_of(model)[0], batches(0, 5))
    other = net(seed=1)
    other.load_state_dict(model.state_dict())
    optimizer, _ = optimizer_of(other)
    with pytest.raises(RuntimeError, match="load its state along with that of the model"):
        train(other, optimizer, batches(5, 6))
