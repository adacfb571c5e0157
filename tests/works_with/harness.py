"""The one test that every combination has to pass: 20 steps of a transformer and of a residual network.

A combination is a `Scenario`. `run` trains with it and says how far the weights end from those of the equations,
computed in fp32 in one process (`integrations/reference.py`); how many operands of matmuls had a sparse weight's shape,
and which of them were not 2:4; and how far a run ends that was stopped in the middle and resumed with fresh objects.
"""

import functools
import io
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from integrations.reference import Gemms, plain_steps
from plain_loop import BETAS, DECAY, LR, MOMENTUM, WEIGHT_DECAY, distance
from works_with.nets import DIMS, NETS, ResNet, batches, loss_of, made, sparse

import openwork as ow
from openwork.training.parametrize import trained_weights

STEPS, HALF, CLIP, RHO, EPS = 20, 10, 0.2, 0.05, 1e-3
LATE = ("head", 6)  # these parameters join at this step


# --- what an optimizer does, from its paper ----------------------------------------------------------------------


def sgd(w, g, state, t):
    g = g + WEIGHT_DECAY * w
    state["v"] = MOMENTUM * state["v"] + g if "v" in state else g
    return w - LR * state["v"]


def adamw(w, g, state, t):
    state["m"] = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * g * g
    m, v = state["m"] / (1 - BETAS[0] ** t), state["v"] / (1 - BETAS[1] ** t)
    return w * (1 - LR * WEIGHT_DECAY) - LR * m / (v.sqrt() + EPS)


def schedule_free(w, g, state, t):
    """SGD, arXiv:2405.15682: gradients are taken at y, which is what the model holds in training."""
    z, x = state.get("z", w), state.get("x", w)
    z = z - LR * (g + WEIGHT_DECAY * w)
    x = x + (z - x) / t
    state.update(z=z, x=x)
    return (1 - MOMENTUM) * z + MOMENTUM * x


FOR_THE_PAGE = "OPENWORK_WORKS_WITH" in os.environ
UPDATES = {"sgd": sgd, "adamw": adamw, "schedule-free": schedule_free}


def sgd_of(model, **more):
    return [torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **more)]


def adamw_of(model, **more):
    return [torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **more)]


# --- a combination -----------------------------------------------------------------------------------------------


def plainly(training, batch):
    training.backward(batch)
    training.update()


@dataclass(frozen=True)
class Scenario:
    """`step` trains on a batch; `make` builds the optimizers; `wrap(model, gemms)` gives what is called instead of the
    model. `always`: on both nets also when docs/works-with.md is not made; the others train the small one then.
    """

    step: Callable = plainly
    make: Callable = sgd_of
    wrap: Callable = lambda model, gemms: model
    update: str = "sgd"
    reference: dict = field(default_factory=dict)
    method: object = ow.SRSTE(DECAY)
    autocast: torch.dtype | None = None
    scaler: bool = False
    dtype: torch.dtype = torch.float32
    watched_inside: bool = False
    tolerance: float = 1e-4
    resumes: bool = True
    packages: tuple = ()
    always: bool = False


@dataclass
class Result:
    """`difference` from the equations, sparse operands `seen`, those found `dense`, and the difference once resumed."""

    difference: float
    seen: int
    dense: list
    resumed: float = math.nan


class Training:
    """A model, its optimizers and what they need, made afresh from a scenario. `rank` of `ranks`: which part of each
    batch is this process's."""

    def __init__(self, scenario, kind, gemms=None, rank=0, ranks=1):
        self.scenario, self.rank, self.ranks, self.t = scenario, rank, ranks, 0
        self.watching = gemms if gemms and not scenario.watched_inside else nullcontext()
        self.model = sparse(kind, scenario.method).to(scenario.dtype)
        self.call = scenario.wrap(self.model, gemms)
        self.optimizers = scenario.make(self.model)
        self.handles = [ow.attach(each, self.model) for each in self.optimizers if trained_weights(each, self.model)]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scenario.scaler)

    def on(self, batch):
        """Train on this process's part of a batch."""
        self.t += 1
        x, y = (each.chunk(self.ranks)[self.rank] for each in batch)
        self.scenario.step(self, (x.to(self.scenario.dtype), y))

    def loss(self, batch):
        with torch.autocast("cpu", self.scenario.autocast) if self.scenario.autocast else nullcontext():
            return _loss(self.call, batch)

    def backward(self, batch, parts=1):
        """Forward and backward, watched: what follows holds no product."""
        with self.watching:
            self.scaler.scale(self.loss(batch) / parts).backward()

    def update(self):
        for each in self.optimizers:
            self.scaler.step(each)
        self.scaler.update()
        self.zero_grad()

    def zero_grad(self):
        for each in self.optimizers:
            each.zero_grad()

    @property
    def weights(self):
        state = {name: whole(w).detach().clone() for name, w in self.model.state_dict().items()}
        return {name: w for name, w in state.items() if not name.endswith("_mask")}

    def state_dict(self):
        parts = (self.model, *self.optimizers, *self.handles, self.scaler)
        return {"t": self.t, "parts": [each.state_dict() for each in parts]}

    def load_state_dict(self, state):
        self.t = state["t"]
        for each, its_state in zip(
            (self.model, *self.optimizers, *self.handles, self.scaler), state["parts"], strict=True
        ):
            each.load_state_dict(its_state)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@functools.cache
def _reference(kind, update, decay, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    data = [(x.to(dtype), y) for x, y in batches(kind, STEPS)]
    return plain_steps(made(kind).to(dtype), data, _loss, kind.dims, UPDATES[update], decay=decay, **options)


def _loss(call, batch):
    return loss_of(lambda x: call(x).float(), batch)


def reference(scenario, kind, decay=DECAY):
    """The weights after 20 steps of the equations."""
    return _reference(kind, scenario.update, decay, tuple(scenario.reference.items()))


def nets_of(scenario):
    return NETS if scenario.always or FOR_THE_PAGE else (ResNet,)


def run(scenario, kind, **ranks):
    """Train for 20 steps, watched; then once more from the middle."""
    data, gemms, saved = batches(kind, STEPS), Gemms(DIMS[kind]), io.BytesIO()
    training = Training(scenario, kind, gemms, **ranks)
    for step, batch in enumerate(data):
        if step == HALF and scenario.resumes:
            torch.save(training.state_dict(), saved)
        training.on(batch)
    end = training.weights
    result = Result(distance(end, reference(scenario, kind)), gemms.seen, gemms.dense)
    if scenario.resumes:
        result.resumed = distance(resumed(scenario, kind, saved, data[HALF:], **ranks), end)
    return result


def resumed(scenario, kind, saved, data, **ranks):
    saved.seek(0)
    training = Training(scenario, kind, Gemms(DIMS[kind]) if scenario.watched_inside else None, **ranks)
    training.load_state_dict(torch.load(saved, weights_only=True))
    for batch in data:
        training.on(batch)
    return training.weights


def check(row, group, name, scenario, results):
    """What every combination has to show, and its line in docs/works-with.md."""
    for kind, result in results.items():
        assert result.difference < scenario.tolerance
        assert result.dense == []
        assert result.seen >= STEPS * products(kind)
        assert result.resumed == 0 or not scenario.resumes
    row(
        group,
        name,
        difference={kind.__name__: result.difference for kind, result in results.items()},
        tolerance=scenario.tolerance,
        resumes=scenario.resumes,
        packages=scenario.packages,
    )


def products(kind):
    """Products of a forward and backward pass that have a sparse weight in them: the first has no input's gradient."""
    return 2 * len(kind.dims) - (kind is ResNet)
