"""Mask decay: its equation, what everything says while it runs, and exact resumes in the middle."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.nm.groups import Axis
from openwork.nm.masks import magnitude_mask

torch.set_num_threads(1)

LR, MOMENTUM, STEPS = 0.1, 0.9, 8
TWO_OF_FOUR = ow.Pattern(2, 4)
WAYS = [{"linear": linear, "straight_through": through} for linear in (True, False) for through in (True, False)]


def net(method=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    report = ow.sparsify(model, "2:4", method or ow.MdGf(STEPS))
    return model, report


def batches(start, stop, dtype=torch.float64):
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(dtype) for step in range(start, stop)]


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    return optimizer, ow.attach(optimizer, model)


def train(model, optimizer, data, forward=None):
    for x in data:
        optimizer.zero_grad()
        ((forward or model)(x) - 3).square().mean().backward()
        optimizer.step()


def beta_at(step, linear):
    if step >= STEPS:
        return 0.0
    return 1 - step / STEPS if linear else math.exp(-math.log(1000) * step / STEPS)


class ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask, beta, through):
        factor = mask.double() + (~mask).double() * beta
        ctx.factor = 1.0 if through else factor
        return weight * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None, None, None


def by_hand(linear, straight_through, steps):
    """The dense weights after so many steps of SGD with momentum, from the equation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for step, x in enumerate(batches(0, steps)):
        beta, used = beta_at(step, linear), []
        for layer in (model[0], model[2]):
            mask = magnitude_mask(layer.weight.detach().abs(), TWO_OF_FOUR, Axis(1))
            used.append(ByHand.apply(layer.weight, mask, beta, straight_through))
        optimizer.zero_grad()
        y = nn.functional.linear(nn.functional.linear(x, used[0], model[0].bias).tanh(), used[1], model[2].bias)
        (y - 3).square().mean().backward()
        optimizer.step()
    return [model[0].weight, model[2].weight]


def dense(model):
    return [model[i].parametrizations.weight.original for i in (0, 2)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_trains_as_its_equation_says(way):
    model, _ = net(ow.MdGf(STEPS, **way))
    train(model, sgd(model)[0], batches(0, STEPS + 4))
    for found, expected in zip(dense(model), by_hand(**way, steps=STEPS + 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=4e-15, atol=4e-16)


def test_the_ways_differ():
    ends = [torch.cat([w.flatten() for w in by_hand(**way, steps=STEPS)]) for way in WAYS]
    assert all(not torch.allclose(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_until_it_ends_everything_says_what_the_weights_are(tmp_path):
    model, report = net(ow.MdGf(STEPS, linear=True))
    assert "mask decay beta = 1: not yet 2:4 (step 0 of 8)" in str(report)
    assert report.rows[0].density == 0.5  # in the end
    optimizer, handle = sgd(model)
    train(model, optimizer, batches(0, 6))
    now = "mask decay beta = 0.25: not yet 2:4 (step 6 of 8)"
    assert handle.unfinished == now
    assert now in repr(model)
    assert int((model[0].weight == 0).sum()) == 0
    for act in (ow.verify, lambda model: ow.save(model, tmp_path / "net.safetensors")):
        with pytest.raises(ow.NotSparse, match=r"0\.weight: mask decay beta = 0\.25: not yet 2:4"):
            act(model)
    assert not list(tmp_path.iterdir())
    train(model, optimizer, batches(6, 8))
    assert handle.unfinished == ""
    assert len(ow.verify(model, batches(0, 1)[0]).sparse) == 2
    ow.save(model, tmp_path / "net.safetensors")
    assert torch.equal(ow.load_state_dict(tmp_path / "net.safetensors")["0.weight"], model[0].weight)


@pytest.mark.parametrize("steps", [3, 8])
def test_finalize_prunes_as_at_the_end(steps):
    model, _ = net()
    train(model, sgd(model)[0], batches(0, steps))
    weight = dense(model)[0].detach().clone()
    ow.finalize(model)
    assert torch.equal(model[0].weight, weight * magnitude_mask(weight.abs(), TWO_OF_FOUR, Axis(1)))
    ow.verify(model, pattern="2:4")


@pytest.mark.parametrize("stop", [1, 5, STEPS, STEPS + 1])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(stop):
    whole, _ = net()
    train(whole, sgd(whole)[0], batches(0, STEPS + 3))
    model, _ = net()
    optimizer, _ = sgd(model)
    train(model, optimizer, batches(0, stop))
    torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
    file.seek(0)
    assert int(model.state_dict()["0.weight_step"]) == stop
    resumed, _ = net()
    optimizer, handle = sgd(resumed)
    state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    assert bool(handle.unfinished) == (stop < STEPS)
    assert torch.equal(resumed[0].weight, model[0].weight)
    train(resumed, optimizer, batches(stop, STEPS + 3))
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
    ow.verify(resumed)


def test_a_dense_checkpoint_begins_at_the_start():
    model, _ = net()
    optimizer, handle = sgd(model)
    train(model, optimizer, batches(0, STEPS))
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    model.load_state_dict(plain.state_dict())
    assert "(step 0 of 8)" in handle.unfinished


def test_steps_that_are_skipped_or_accumulated_do_not_count():
    model, _ = net(dtype=torch.float32)
    optimizer, handle = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, wrong in zip(batches(0, 4, torch.float32), (1.0, torch.inf, 1.0, torch.nan), strict=True):
        optimizer.zero_grad()
        for part in (x, -x):
            scaler.scale((model(part) - 3).square().mean() * wrong).backward()
        scaler.step(optimizer)
        scaler.update()
    assert handle.steps == 2
    assert "(step 2 of 8)" in handle.unfinished


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on_from_where_they_are_on_their_own(copied):
    model, _ = net()
    train(model, sgd(model)[0], batches(0, 3))
    twin = copied(model)
    before = model[0].weight.detach().clone()
    assert torch.equal(twin[0].weight, before)
    train(twin, sgd(twin)[0], batches(3, 5))
    assert int(twin.state_dict()["0.weight_step"]) == 5
    assert torch.equal(model[0].weight, before)


def test_the_model_may_change_its_dtype():
    model, _ = net(dtype=torch.float32)
    optimizer, handle = sgd(model)
    train(model, optimizer, batches(0, 3, torch.float32))
    now = handle.unfinished
    model.to(torch.bfloat16)
    assert handle.unfinished == now
    expected = dense(model)[0] * beta_at(3, linear=False)
    pruned = ~ow.masks(model)["0.weight"]
    torch.testing.assert_close(model[0].weight[pruned], expected[pruned], rtol=1e-2, atol=0)


def test_compiled_code_stays_while_beta_changes():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    eager, _ = net()
    train(eager, sgd(eager)[0], batches(0, STEPS + 3))
    model, _ = net()
    forward = torch.compile(model, backend=backend, fullgraph=True)
    train(model, sgd(model)[0], batches(0, STEPS + 3), forward)
    for found, expected in zip(dense(model), dense(eager), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(graphs) == 2  # as the mask decays, and once it has


def test_an_optimizer_that_nobody_attached_is_told_of():
    model, _ = net()
    with pytest.warns(UserWarning, match="nobody attached it: the method's schedule stands still"):
        train(model, torch.optim.SGD(model.parameters(), lr=LR), batches(0, 1))


def test_steps_is_a_number_of_steps():
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="steps="):
            ow.MdGf(wrong)


def test_it_is_sparsified_on_the_meta_device_and_goes_on_wherever_it_was_loaded():
    with torch.device("meta"):
        model = nn.Linear(8, 8)
        ow.sparsify(model, "2:4", ow.MdGf(steps=3))
    model.to_empty(device="cpu")
    nn.init.normal_(model.parametrizations.weight.original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ow.attach(optimizer, model)
    with torch.inference_mode():
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    for _ in range(3):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    assert not handle.unfinished


def test_an_infinite_gradient_leaves_what_is_pruned_alone_once_the_mask_is_hard():
    model = nn.Linear(4, 1, bias=False)
    ow.sparsify(model, "2:4", ow.MdGf(steps=1))
    model.parametrizations.weight[0].go_to(1)
    weight = model.weight
    weight.backward(torch.full_like(weight, torch.inf))
    gradient = model.parametrizations.weight.original.grad
    assert sorted(gradient.flatten().tolist()) == [0.0, 0.0, torch.inf, torch.inf]
