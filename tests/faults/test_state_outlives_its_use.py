"""Handles, hooks, recorders and watches used a second time, for a second model, or after the end of the first."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from outer_optimizer import Outer
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import openwork as ow

D, DECAY, LR = torch.float64, 0.5, 0.1


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16, bias=False, dtype=D), nn.Tanh(), nn.Linear(16, 8, bias=False, dtype=D))


def times_added(model, optimizer):
    """One step of SGD: how often the term was added to each sparse weight."""
    optimizer.zero_grad()
    model(torch.randn(5, 16, dtype=D)).square().mean().backward()
    masks = ow.masks(model)
    weights = {name: model.get_submodule(name.rpartition(".")[0]) for name in masks}
    weights = {name: module.parametrizations.weight.original for name, module in weights.items()}
    before = {name: (w.detach().clone(), w.grad.clone()) for name, w in weights.items()}
    optimizer.step()
    times = {}
    for name, mask in masks.items():
        (w, g), term = before[name], DECAY * before[name][0] * ~mask
        moved = ((w - LR * g - weights[name].detach()) / LR)[~mask]
        times[name] = round(float(moved.norm() / term[~mask].norm()), 6)
    return times


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR)


ONCE = {"0.weight": 1.0, "2.weight": 1.0}


@pytest.mark.parametrize("detaches", [False, True])
def test_sparsified_anew_the_term_is_added_once(detaches):
    model = net()
    optimizer = sgd(model)
    handles = []
    for pattern in ("2:4", "1:4", "1:8"):
        ow.sparsify(model, pattern, ow.SRSTE(DECAY))
        handles.append(ow.attach(optimizer, model))
        with torch.no_grad():
            for w in model.parameters():
                w.normal_()
        assert times_added(model, optimizer) == ONCE
        if detaches:
            handles[-1].detach()
        ow.finalize(model)
    assert [handle.steps for handle in handles] == [1, 1, 1]


def test_finalized_handles_do_not_pile_up():
    model = net()
    optimizer = sgd(model)
    for _ in range(5):
        ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
        ow.attach(optimizer, model)
        ow.finalize(model)
    assert len(vars(optimizer)["_openwork_hooks"].handles) == 1
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_sparsified_layer_by_layer_the_term_is_added_once():
    model = net()
    optimizer = sgd(model)
    ow.sparsify(model[0], "2:4", ow.SRSTE(DECAY))
    first = ow.attach(optimizer, model, topology=ow.Topology(every=1))
    assert times_added(model, optimizer) == {"0.weight": 1.0}
    ow.sparsify(model[2], "2:4", ow.SRSTE(DECAY))
    with pytest.raises(ValueError, match=r"attached already.*hand it the part that was sparsified since: 2"):
        ow.attach(optimizer, model)
    later = ow.attach(optimizer, model[2], topology=ow.Topology(every=1))
    assert times_added(model, optimizer) == ONCE
    assert (first.steps, later.steps) == (2, 1)
    assert list(first.topology.records[-1]["layers"]) == ["0.weight"]
    assert list(later.topology.records[-1]["layers"]) == ["weight"]
    for part in (model, model[0], model[2]):
        with pytest.raises(ValueError, match="attached already"):
            ow.attach(optimizer, part)
    ow.finalize(model[0])
    assert times_added(model, optimizer) == {"2.weight": 1.0}
    assert (first.steps, later.steps) == (2, 2)


def test_stored_masks_age_by_one_a_step():
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        ow.sparsify(model, "2:4", ow.TransposableSRSTE(0.02, refresh_every=40))
        ow.attach(optimizer, model)
        for _ in range(3):
            model(torch.randn(5, 16, dtype=D)).square().mean().backward()
            optimizer.step()
        assert int(model.state_dict()["0.weight_mask_age"]) == 3
        ow.finalize(model)


def test_a_finalized_handle_keeps_its_count_and_warns_once():
    model = net()
    optimizer = sgd(model)
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    handle = ow.attach(optimizer, model, topology=ow.Topology(every=1))
    times_added(model, optimizer)
    ow.finalize(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="the model was finalized, but its optimizer still steps"):
        optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert (handle.steps, handle.unfinished, len(handle.topology.records)) == (1, "", 1)
    assert handle.state_dict()["steps"] == 1
    handle.detach()
    handle.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert "step" not in vars(optimizer)


def test_a_handle_detached_twice_leaves_the_next_one_alone():
    model = net()
    optimizer = sgd(model)
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    first = ow.attach(optimizer, model)
    first.detach()
    ow.attach(optimizer, model)
    first.detach()
    assert times_added(model, optimizer) == ONCE


def test_one_optimizer_over_two_models():
    models = [net(), net()]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=LR)
    for model in models:
        ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    handles = [ow.attach(optimizer, model) for model in models]
    assert [times_added(model, optimizer) for model in models] == [ONCE, ONCE]
    ow.finalize(models[0])
    assert times_added(models[1], optimizer) == ONCE
    assert [handle.steps for handle in handles] == [2, 3]


def test_another_optimizer_over_the_same_model():
    model = net()
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    topology = ow.Topology(every=1)
    first = sgd(model)
    ow.attach(first, model, topology=topology)
    times_added(model, first)
    second = sgd(model)
    with pytest.raises(ValueError, match="this Topology records the steps of another optimizer"):
        ow.attach(second, model, topology=topology)
    del first
    handle = ow.attach(second, model, topology=topology)
    assert times_added(model, second) == ONCE
    assert [record["step"] for record in topology.records] == [1, 2]
    assert handle.steps == 2


def test_an_optimizer_and_the_one_inside_it_are_attached_once():
    model = net()
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    outer = Outer(sgd(model))
    ow.attach(outer, model)
    with pytest.raises(ValueError, match="attached already"):
        ow.attach(outer.inner, model)
    assert times_added(model, outer) == ONCE


def test_a_recorder_is_for_one_model():
    topology, models = ow.Topology(every=1), [net(), net()]
    for model in models:
        ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    optimizers = [sgd(model) for model in models]
    handle = ow.attach(optimizers[0], models[0], topology=topology)
    with pytest.raises(ValueError, match="records the steps of another optimizer"):
        ow.attach(optimizers[1], models[1], topology=topology)
    handle.detach()
    with pytest.raises(ValueError, match="this Topology recorded another Sequential: use one recorder for each model"):
        ow.attach(optimizers[1], models[1], topology=topology)
    assert not optimizers[1]._optimizer_step_pre_hooks
    ow.attach(optimizers[1], models[1], topology=copy.deepcopy(topology))
    assert times_added(models[1], optimizers[1]) == ONCE


def test_a_recorder_of_other_weights_is_refused_where_it_is_attached():
    model, topology = net(), ow.Topology(every=1)
    optimizer = sgd(model)
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    ow.attach(optimizer, model, topology=topology)
    ow.finalize(model)
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY), exclude=["0"])
    with pytest.raises(ValueError, match="other weights than at the start"):
        ow.attach(optimizer, model, topology=topology)
    ow.attach(optimizer, model)
    torch.nn.init.normal_(model[2].parametrizations.weight.original)
    assert times_added(model, optimizer) == {"2.weight": 1.0}


def test_a_model_replaced_by_its_copy_is_not_served_by_the_old_handle():
    model = net()
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    optimizer = sgd(model)
    ow.attach(optimizer, model)
    twin = copy.deepcopy(model)
    second = sgd(twin)
    with pytest.warns(UserWarning, match="nobody attached it"):
        assert times_added(twin, second) == dict.fromkeys(ONCE, 0.0)
    ow.attach(second, twin)
    assert times_added(twin, second) == ONCE
    assert times_added(model, optimizer) == ONCE


# --- the collector, threads -------------------------------------------------------------------------------------


@pytest.fixture
def collecting():
    """The collector runs where it hurts: while torch goes through its hooks."""
    gc.collect()
    gc.disable()
    handles = [
        register_optimizer_step_pre_hook(lambda *_: gc.collect() and None),
        register_optimizer_step_post_hook(lambda *_: gc.collect() and None),
    ]
    yield
    for handle in handles:
        handle.remove()
    gc.enable()


@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("method", [ow.SRSTE(), ow.TransposableSRSTE(), ow.ASP()], ids=lambda method: method.name)
def test_a_model_may_end_in_the_middle_of_a_step(method, attached):
    pre, post = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    old = net()
    old.__dict__["owner"] = [old]  # as trainers, callbacks and closures make them
    ow.sparsify(old, "2:4", method)
    if attached:
        ow.attach(sgd(old), old)
    gone = weakref.ref(old)
    del old
    dense = net()
    optimizer = sgd(dense)
    dense(torch.randn(2, 16, dtype=D)).sum().backward()
    optimizer.step()
    assert gone() is None
    assert dict(_global_optimizer_pre_hooks) == pre
    assert dict(_global_optimizer_post_hooks) == post


def test_models_come_and_go_while_others_step():
    dense = net()
    optimizer, failures, stop = sgd(dense), [], threading.Event()
    dense(torch.randn(2, 16, dtype=D)).sum().backward()

    def step():
        try:
            while not stop.is_set():
                optimizer.step()
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    for _ in range(30):
        model = net()
        ow.sparsify(model, "2:4")
        ow.attach(sgd(model), model).detach()
        ow.finalize(model)
    stop.set()
    thread.join()
    assert failures == []


def test_detaching_and_finalizing_inside_a_step():
    model = net()
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    optimizer = sgd(model)
    handle = ow.attach(optimizer, model)
    hook = optimizer.register_step_pre_hook(lambda *_: (handle.detach(), None)[1])
    model(torch.randn(5, 16, dtype=D)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    hook.remove()
    ow.attach(optimizer, model)
    assert times_added(model, optimizer) == ONCE
    optimizer.register_step_post_hook(lambda *_: ow.masks(model) and ow.finalize(model))
    optimizer.step()
    assert type(model[0]) is nn.Linear
