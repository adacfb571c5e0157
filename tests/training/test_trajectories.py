"""Whatever the loop does to the gradients, training takes the steps of the equations.

Every case ends within rounding of `plain_loop`, in float64. That the cases would notice a term that is lost or
multiplied is tested as well: by detaching, by other decays, and by the published form inside autograd.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pytest
import torch
from plain_loop import (
    BETAS,
    DECAY,
    EPS,
    LR,
    MOMENTUM,
    UPDATES,
    WEIGHT_DECAY,
    Net,
    batches,
    distance,
    keep_by_sorting,
    plain_loop,
)
from torch.nn.utils import clip_grad_norm_

import openwork as ow
from openwork.methods import Method

CLIP = 0.2
SRSTE = ow.SRSTE(decay=DECAY)
DECOUPLED = ow.SRSTE(decay=DECAY, decoupled=True)
ADAM = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
    "adam": partial(torch.optim.Adam, **ADAM),
    "adamw": partial(torch.optim.AdamW, **ADAM),
}


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


# --- loops that people write -------------------------------------------------------------------------------------


def plainly(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def keeping_zeroed_gradients(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, x, y).backward()
        optimizer.step()


def four_micro_batches(model, optimizer, data):
    for x, y in data:
        for x_part, y_part in zip(x.chunk(4), y.chunk(4), strict=True):
            (loss_of(model, x_part, y_part) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def clipped(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def with_closure(model, optimizer, data, by_keyword=False):
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert loss.item() > 0


def with_clipping_closure(model, optimizer, data):
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            clip_grad_norm_(model.parameters(), CLIP)

        optimizer.step(closure)


def last_of_four_in_a_closure(model, optimizer, data, by_keyword=False):
    """What Lightning does when it accumulates: the earlier micro-batches' gradients are there before the step."""
    for x, y in data:
        parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
        optimizer.zero_grad()
        for part in parts[:3]:
            (loss_of(model, *part) / 4).backward()

        def closure(part=parts[3]):
            loss = loss_of(model, *part) / 4
            loss.backward()
            return loss

        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)


def loss_scaled_by_hand(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        (loss_of(model, x, y) * 65536.0).backward()
        for parameter in model.parameters():
            parameter.grad /= 65536.0
        optimizer.step()


def under_scaler(model, optimizer, data, *, clip=False, parts=1, overflow_at=()):
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for step, (x, y) in enumerate(data):
        if step in overflow_at:  # one batch more, which must leave no trace
            scaler.scale(loss_of(model, x, y) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            scaler.scale(loss_of(model, x_part, y_part) / parts).backward()
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 65536.0 / 2 ** len(overflow_at)


def compiled(model, optimizer, data):
    torch.compiler.reset()
    plainly(torch.compile(model, backend="aot_eager"), optimizer, data)


@dataclass(frozen=True)
class Way:
    loop: object
    uses: int = 1
    clip: float | None = None
    fused: bool = False


everything = partial(under_scaler, clip=True, parts=4, overflow_at=(2, 5))
WAYS = {
    "plain": Way(plainly),
    "zeroed gradients": Way(keeping_zeroed_gradients),
    "loss scale": Way(loss_scaled_by_hand),
    "scaler": Way(under_scaler),
    "scaler, overflow": Way(partial(under_scaler, overflow_at=(2, 5))),
    "4 micro-batches": Way(four_micro_batches),
    "12 uses": Way(plainly, uses=12),
    "clipped": Way(clipped, clip=CLIP),
    "closure": Way(with_closure),
    "closure=": Way(partial(with_closure, by_keyword=True)),
    "closure, micro-batches": Way(last_of_four_in_a_closure),
    "closure=, micro-batches": Way(partial(last_of_four_in_a_closure, by_keyword=True)),
    "closure that clips": Way(with_clipping_closure, clip=CLIP),
    "fused": Way(plainly, fused=True),
    "fused, scaler": Way(under_scaler, fused=True),
    "fused, scaler, overflow": Way(partial(under_scaler, overflow_at=(2, 5)), fused=True),
    "fused, all at once": Way(everything, uses=12, clip=CLIP, fused=True),
    "all at once": Way(everything, uses=12, clip=CLIP),
    "compiled": Way(compiled),
}


# --- the claim ---------------------------------------------------------------------------------------------------


def sparsified(way, method=SRSTE, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net(way.uses).to(dtype)
    ow.sparsify(model, "2:4", method)
    return model


def trained(way, kind, *, method=SRSTE, steps=10, dtype=torch.float64, attached=True):
    """The dense weights before and after training, by name."""
    model = sparsified(way, method, dtype)
    optimizer = OPTIMIZERS[kind](model.parameters(), fused=way.fused)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = ow.attach(optimizer, model)
    if not attached:
        handle.detach()
    way.loop(model, optimizer, batches(steps, dtype))
    assert handle.steps == (steps if attached else 0)
    return start, model.state_dict()


def reference(way, kind, start, *, steps=10, **options):
    data = batches(steps, next(iter(start.values())).dtype)
    return plain_loop(start, data, UPDATES[kind], uses=way.uses, clip=way.clip, **options)


every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_kind = pytest.mark.parametrize("kind", UPDATES)


@every_kind
def test_a_hundred_steps_are_those_of_the_equations(kind):
    start, end = trained(WAYS["plain"], kind, steps=100)
    assert distance(end, reference(WAYS["plain"], kind, start, steps=100)) < 1e-10


@every_kind
@every_way
def test_every_loop_takes_the_same_steps(way, kind):
    start, end = trained(way, kind)
    assert distance(end, reference(way, kind, start)) < 1e-11


@every_kind
@every_way
def test_every_loop_takes_the_same_steps_when_decoupled(way, kind):
    start, end = trained(way, kind, method=DECOUPLED)
    right = reference(way, kind, start, decoupled=True)
    assert distance(end, right) < 1e-11
    assert distance(reference(way, kind, start, decay=2 * DECAY, decoupled=True), right) > 1e-3


@pytest.mark.parametrize("name", ["plain", "fused, scaler, overflow"])
@every_kind
def test_decoupled_in_single_precision_takes_the_same_steps(name, kind):
    start, end = trained(WAYS[name], kind, method=DECOUPLED, dtype=torch.float32)
    assert distance(end, reference(WAYS[name], kind, start, decoupled=True)) < 2e-5


# --- schedules: the step that a mask is of is the number of steps that were taken -----------------------------------


def linear(weight, step, steps=6):
    return keep_by_sorting(weight), max(0.0, 1 - step / steps)


def ramp(weight, step):
    """Of the groups of four those with the smallest sums of magnitudes stay dense."""
    groups = weight.movedim(1, -1).reshape(-1, 4).abs().sum(-1).tolist()
    stay = sorted(range(len(groups)), key=lambda i: groups[i])[: int(max(0.0, 1 - step / 6) * len(groups))]
    dense = torch.tensor([i in stay for i in range(len(groups))]).repeat_interleave(4)
    last = weight.movedim(1, -1).shape
    return keep_by_sorting(weight) | dense.view(last).movedim(-1, 1), 0.0


SCHEDULES = {
    "mask decay": (ow.MaskDecay(6, linear=True), linear),
    "structure decay": (ow.StructureDecay(4), lambda w, step: (keep_by_sorting(w, 3 if step < 4 else 2), 0.0)),
    "ramp": (ow.Ramp(6), ramp),
    "dense, then mask decay": (
        ow.DenseWarmup(3, ow.MaskDecay(4, linear=True)),
        lambda w, step: linear(w, step - 3, 4) if step >= 3 else (keep_by_sorting(w, 4), 0.0),
    ),
    "dense in the end": (ow.DenseTail(6), lambda w, step: (keep_by_sorting(w, 2 if step < 6 else 4), 0.0)),
}
SCHEDULED_WAYS = {"plain": False, "scaler, overflow": True, "fused, all at once": False, "compiled": True}


@pytest.mark.parametrize(("way", "decoupled"), SCHEDULED_WAYS.items())
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_by_the_steps_that_were_taken(name, way, decoupled):
    schedule, rule = SCHEDULES[name]
    kind = "adamw" if decoupled else "sgd"
    method = ow.SRSTE(decay=DECAY, decoupled=decoupled, schedule=schedule)
    start, end = trained(WAYS[way], kind, method=method)
    added = {tensor for tensor in end if tensor not in dict(sparsified(WAYS[way]).state_dict())}
    assert {int(end.pop(tensor)) for tensor in added} == {10}
    start = {tensor: value for tensor, value in start.items() if tensor in end}
    right = reference(WAYS[way], kind, start, decoupled=decoupled, schedule=rule)
    assert distance(end, right) < 1e-11
    late = reference(WAYS[way], kind, start, decoupled=decoupled, schedule=lambda w, step: rule(w, step + 1))
    assert distance(late, right) > 1e-4


def test_decoupled_ends_elsewhere_than_coupled_under_adam():
    start, end = trained(WAYS["plain"], "adamw", method=DECOUPLED)
    assert distance(end, reference(WAYS["plain"], "adamw", start)) > 1e-2


@pytest.mark.parametrize("name", ["plain", "scaler", "fused, scaler, overflow", "4 micro-batches", "12 uses"])
@every_kind
def test_single_precision_takes_the_same_steps(name, kind):
    start, end = trained(WAYS[name], kind, dtype=torch.float32)
    assert distance(end, reference(WAYS[name], kind, start)) < 2e-5


# --- and what shows that the claim is tested ---------------------------------------------------------------------


@every_kind
@every_way
def test_without_the_term_every_loop_ends_elsewhere(way, kind):
    start, end = trained(way, kind, attached=False)
    assert distance(end, reference(way, kind, start)) > 1e-2
    assert distance(end, reference(way, kind, start, decay=0.0)) < 1e-11


@pytest.mark.parametrize("factor", [1 / 65536, 1 / 4, 1 / 2, 2, 4, 12, 65536])
@every_kind
def test_a_multiplied_term_ends_elsewhere(kind, factor):
    for way in (WAYS["plain"], WAYS["all at once"]):
        start = sparsified(way).state_dict()
        right = reference(way, kind, start)
        assert not distance(reference(way, kind, start, decay=factor * DECAY), right) < 1e-2


@dataclass(frozen=True)
class Authors(Method):
    """The term inside autograd, as the authors' code has it."""

    name: ClassVar[str] = "sr-ste inside autograd"
    weights: dict = field(default_factory=dict, compare=False)

    def forward(self, weight, mask, phase, state):
        self.weights[mask.data_ptr()] = weight
        return weight * mask

    def backward(self, gradient, mask, phase, state):
        return gradient + DECAY * ~mask * self.weights[mask.data_ptr()]


@every_kind
def test_inside_autograd_only_the_plain_loop_is_right(kind):
    def error(name):
        start, end = trained(WAYS[name], kind, method=Authors())
        return distance(end, reference(WAYS[name], kind, start))

    assert error("plain") < 1e-11
    assert min(map(error, ("scaler", "fused, scaler", "loss scale", "4 micro-batches", "clipped"))) > 1e-2
