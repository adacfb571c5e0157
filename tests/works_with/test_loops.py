"""Loops, optimizers and precisions, each with the test of `harness.py`."""

from functools import partial

import pytest
import torch
from integrations.reference import keep_along
from plain_loop import LR, MOMENTUM, WEIGHT_DECAY, distance, keep_by_sorting
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from works_with.harness import CLIP, LATE, RHO, Scenario, adamw_of, check, nets_of, plainly, reference, run, sgd_of
from works_with.sam import SAM

import openwork as ow


def two_micro_batches(training, batch):
    for part in zip(*(each.chunk(2) for each in batch), strict=True):
        training.backward(part, parts=2)
    training.update()


def clipped(training, batch):
    training.backward(batch)
    for each in training.optimizers:
        training.scaler.unscale_(each)
    clip_grad_norm_(training.model.parameters(), CLIP)
    training.update()


def clipped_micro_batches(training, batch):
    for part in zip(*(each.chunk(2) for each in batch), strict=True):
        training.backward(part, parts=2)
    for each in training.optimizers:
        training.scaler.unscale_(each)
    clip_grad_norm_(training.model.parameters(), CLIP)
    training.update()


def with_closure(training, batch):
    def closure():
        training.zero_grad()
        training.backward(batch)

    (optimizer,) = training.optimizers
    optimizer.step(closure)


def joined_by_the_head(training, batch):
    (optimizer,) = training.optimizers
    if training.t == LATE[1]:
        optimizer.add_param_group({"params": list(training.model.head.parameters())})
    training.backward(batch)
    training.update()
    training.model.head.zero_grad()


def stepping_in_backward(training, batch):
    """One optimizer a parameter, stepped as soon as its gradient is there: no gradient outlives its layer."""
    if not getattr(training, "hooked", False):
        training.hooked = True
        for each in training.optimizers:
            (weight,) = each.param_groups[0]["params"]
            weight.register_post_accumulate_grad_hook(partial(_step, each))
    training.backward(batch)


def _step(optimizer, _):
    optimizer.step()
    optimizer.zero_grad()


def sharpness_aware(training, batch):
    training.backward(batch)
    training.model.sam.first_step()
    training.backward(batch)
    training.model.sam.second_step()


def back_and_forth(training, batch):
    """Schedule-free optimizers hold other weights in training than in evaluation."""
    (optimizer,) = training.optimizers
    optimizer.eval()
    ow.verify(training.model)
    optimizer.train()
    plainly(training, batch)


def checkpointed(model, _, *, reentrant):
    """Each block's activations are computed again in the backward pass; of the residual network all."""

    def call(x):
        x = x.requires_grad_()
        if not hasattr(model, "layers"):
            return checkpoint(model, x, use_reentrant=reentrant)
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return model.head(x.mean(1))

    return call


def functional(model, _):
    return lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x)


def two_groups(model):
    groups = [
        {"params": list(model.head.parameters())},
        {"params": [p for n, p in model.named_parameters() if "head" not in n]},
    ]
    return [torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)]


def two_optimizers(model):
    weights = [p for n, p in model.named_parameters() if "head" not in n]
    half = len(weights) // 2
    parts = [*weights[:half], *model.head.parameters()], weights[half:]
    return [torch.optim.SGD(part, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY) for part in parts]


def one_for_each(model):
    return [torch.optim.SGD([p], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY) for p in model.parameters()]


def inside_sam(model):
    model.sam = SAM(model.parameters(), torch.optim.SGD, RHO, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return [model.sam.base_optimizer]


def without_schedule(model):
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.SGDScheduleFree(
        model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=False
    )
    optimizer.train()
    return [optimizer]


def all_but_the_head(model):
    weights = [p for n, p in model.named_parameters() if "head" not in n]
    return [torch.optim.SGD(weights, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)]


FP16, BF16 = (
    {"autocast": torch.float16, "scaler": True, "tolerance": 2e-2},
    {"autocast": torch.bfloat16, "tolerance": 2e-2},
)
CLIPPED = {"reference": {"clip": CLIP}}
SCENARIOS = {
    "Loop": {
        "plain": Scenario(always=True),
        "2 micro-batches a step": Scenario(two_micro_batches),
        "gradient clipping": Scenario(clipped, **CLIPPED),
        "`step(closure)`": Scenario(with_closure),
        "several parameter groups": Scenario(make=two_groups),
        "two optimizers": Scenario(make=two_optimizers),
        "parameters added later (`add_param_group`)": Scenario(
            joined_by_the_head, make=all_but_the_head, reference={"late": LATE}, resumes=False
        ),
    },
    "Optimizer": {
        "SGD, `foreach=True`": Scenario(make=lambda model: sgd_of(model, foreach=True)),
        "SGD, `foreach=False`": Scenario(make=lambda model: sgd_of(model, foreach=False)),
        "SGD, `fused=True`": Scenario(make=lambda model: sgd_of(model, fused=True)),
        "one optimizer a parameter, stepping in the backward pass": Scenario(stepping_in_backward, make=one_for_each),
        "SAM, attached through its `base_optimizer`": Scenario(
            sharpness_aware, make=inside_sam, reference={"rho": RHO}
        ),
        "schedule-free SGD": Scenario(
            back_and_forth, make=without_schedule, update="schedule-free", packages=("schedulefree",)
        ),
        "AdamW, `foreach=True`": Scenario(make=lambda model: adamw_of(model, foreach=True), update="adamw"),
        "AdamW, `fused=True`": Scenario(always=True, make=lambda model: adamw_of(model, fused=True), update="adamw"),
    },
    "Memory and functions": {
        "activation checkpointing": Scenario(wrap=partial(checkpointed, reentrant=False)),
        "activation checkpointing, `use_reentrant=True`": Scenario(wrap=partial(checkpointed, reentrant=True)),
        "`torch.func.functional_call`": Scenario(wrap=functional),
    },
    "Precision": {
        "fp16 autocast, `GradScaler`": Scenario(**FP16),
        "fp16 autocast, `GradScaler`, fused SGD": Scenario(
            make=lambda model: sgd_of(model, fused=True), always=True, **FP16
        ),
        "`GradScaler` in fp32, fused AdamW, which takes `grad_scale`": Scenario(
            make=lambda model: adamw_of(model, fused=True), update="adamw", scaler=True
        ),
        "fp16 autocast, `GradScaler`, clipping, 2 micro-batches": Scenario(clipped_micro_batches, **FP16, **CLIPPED),
        "bf16 autocast": Scenario(always=True, **BF16),
        "bf16 parameters, against the equations in bf16": Scenario(
            dtype=torch.bfloat16, reference={"dtype": torch.bfloat16}, tolerance=2e-2
        ),
    },
}
ROWS = [
    pytest.param(group, name, scenario, id=name) for group, ways in SCENARIOS.items() for name, scenario in ways.items()
]


@pytest.mark.parametrize(("group", "name", "scenario"), ROWS)
def test_it_takes_the_steps_of_the_equations(row, group, name, scenario):
    check(row, group, name, scenario, {kind: run(scenario, kind) for kind in nets_of(scenario)})


@pytest.mark.parametrize(("name", "scenario"), [pytest.param(*each.values[1:], id=each.id) for each in ROWS])
def test_a_lost_term_would_be_seen(name, scenario):
    for kind in nets_of(scenario):
        assert distance(reference(scenario, kind, decay=0.0), reference(scenario, kind)) > 10 * scenario.tolerance


def test_the_masks_of_the_equations_are_those_of_sorting_by_hand():
    weight = torch.randint(-2, 3, (8, 16, 3)).float()  # with ties
    assert torch.equal(keep_along(weight, 1), keep_by_sorting(weight))
    assert torch.equal(keep_along(weight.transpose(0, 1), 0), keep_by_sorting(weight).transpose(0, 1))
