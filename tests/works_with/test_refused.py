"""What does not work, each with the error that the user gets."""

import pytest
import torch
from plain_loop import DECAY
from torch import nn
from works_with.nets import ResNet, batches, loss_of, sparse
from works_with.sam import SAM

import openwork as ow


def told(call):
    """What an error says, with its kind, on one line."""
    with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {' '.join(str(caught.value).split())}"


def test_lbfgs_with_a_line_search(row):
    model = sparse(ResNet)
    error = told(lambda: ow.attach(torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"), model))
    assert "evaluates losses that lack the method's decay; use line_search_fn=None" in error
    row("Optimizer", "`LBFGS` with a line search", error=error)


def test_sam_attached_itself(row):
    model = sparse(ResNet)
    error = told(lambda: ow.attach(SAM(model.parameters(), torch.optim.SGD, 0.05, lr=0.1), model))
    assert "ow.attach(optimizer.base_optimizer, model)" in error
    row("Optimizer", "SAM, attached itself", error=error)


def test_capturable_optimizers_on_a_cpu(row):
    model = sparse(ResNet)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    ow.attach(optimizer, model)
    loss_of(model, batches(ResNet, 1)[0]).backward()
    error = told(optimizer.step)
    assert "capturable=True" in error
    row("Optimizer", "`capturable=True` on a CPU (torch's own error; needs a GPU)", error=error)


# --- DeepSpeed ---------------------------------------------------------------------------------------------------


def net(method=ow.SRSTE(DECAY)):  # noqa: B008
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    ow.sparsify(model, "2:4", method)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


class Flattened:
    """Like DeepSpeed's: not a torch optimizer, around one that holds copies of the weights."""

    def __init__(self, inner):
        self.optimizer = inner
        inner.param_groups[0]["params"] = [torch.cat([p.flatten() for p in inner.param_groups[0]["params"]])]


def test_optimizers_of_deepspeed_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(Flattened, "__module__", "deepspeed.runtime.zero.stage_1_and_2")
    model, optimizer = net()
    assert 'use DDP or fully_shard instead, or DeepSpeed with {"zero_optimization": {"stage": 0}}' in told(
        lambda: ow.attach(Flattened(optimizer), model)
    )


def test_an_attached_optimizer_whose_weights_are_taken_away_says_so():
    model, optimizer = net()
    ow.attach(optimizer, model)
    Flattened(optimizer)
    assert "held sparse weights of Sequential when it was attached and holds none now" in told(optimizer.step)


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    """With one process group for all tests: DeepSpeed keeps the first that it sees."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        deepspeed = pytest.importorskip(
            "deepspeed", reason="DeepSpeed is not among the packages of the tests: too large"
        )
        meeting = tmp_path_factory.mktemp("deepspeed") / "meeting"
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
        yield deepspeed
        torch.distributed.destroy_process_group()


def engine(deepspeed, model, optimizer, stage):
    config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[:2]


def step(engine):
    engine.backward(engine(torch.ones(4, 8)).square().mean())
    engine.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_of_deepspeed(row, deepspeed, stage):
    model, optimizer = net()
    _, wrapped = engine(deepspeed, model, optimizer, stage)
    error = told(lambda: ow.attach(wrapped, model))
    assert "flattened copies of the weights" in error
    row(
        "Optimizer",
        f"DeepSpeed ZeRO, stage {stage}, attached after `deepspeed.initialize`",
        error=error,
        packages=("deepspeed",),
    )
    model, optimizer = net()
    ow.attach(optimizer, model)
    running, _ = engine(deepspeed, model, optimizer, stage)
    error = told(lambda: step(running))
    assert "holds none now" in error
    row(
        "Optimizer",
        f"DeepSpeed ZeRO, stage {stage}, attached before `deepspeed.initialize`",
        error=error,
        packages=("deepspeed",),
    )


def trained(method, deepspeed=None, stage=0):
    """What the model says after 20 steps."""
    model, optimizer = net(method)
    if method.decay:
        ow.attach(optimizer, model)
    running = engine(deepspeed, model, optimizer, stage)[0] if deepspeed else None
    for _ in range(20):
        if running:
            step(running)
        else:
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        return (running or model)(torch.ones(4, 8))


ZERO = {f"DeepSpeed ZeRO, stage {stage}, with `ow.STE()`, not attached": stage for stage in (1, 2, 3)}


@pytest.mark.parametrize("what", ["DeepSpeed without ZeRO", *ZERO])
def test_deepspeed(row, deepspeed, what):
    method = ow.STE() if what in ZERO else ow.SRSTE(DECAY)
    difference = float((trained(method, deepspeed, ZERO.get(what, 0)) - trained(method)).abs().max())
    assert difference < 1e-6
    found = {"output of two layers": difference}
    row("Optimizer", what, difference=found, tolerance=1e-6, packages=("deepspeed",))
