"""A small transformer in a loop with Accelerate takes the steps of the equations."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from integrations import loop, nets
from integrations.reference import STEPS, Gemms, plain_steps
from plain_loop import UPDATES, distance
from works_with.nets import NETS

import openwork as ow
from openwork.integrations.hf_accelerate import SparseRun
from openwork.integrations.shared import FILE

KIND = nets.Transformer
HALVES, BF16 = {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}
# Accelerate's arguments, the clip, and the tolerance. Without the term the
# net ends 0.3 away.
WAYS = {
    "plain": ({}, None, 1e-6),
    "2 micro-batches": (HALVES, None, 1e-6),
    "clipped": ({}, 0.2, 1e-6),
    "clipped, 2 micro-batches": (HALVES, 0.2, 1e-6),
    "bf16": (BF16, None, 1e-2),
    "bf16, clipped, 2 micro-batches": (HALVES | BF16, 0.2, 1e-2),
}
every_way = pytest.mark.parametrize(("arguments", "clip", "tolerance"), WAYS.values(), ids=WAYS)


def train(arguments, clip, *, attached=True, kind=KIND):
    """The dense weights after the last step, and what every product read."""
    accelerate = loop.accelerator(**arguments)
    model, optimizer, loader = loop.prepared(accelerate, nets.sparse(kind), STEPS, kind=kind)
    if attached:
        SparseRun(accelerate, model, optimizer)
    with Gemms(nets.shapes(kind)) as gemms:
        loop.run(accelerate, model, optimizer, loader, clip=clip)
    return model.state_dict(), gemms


def reference(clip, kind=KIND, **more):
    data = nets.batches(kind, STEPS)
    return plain_steps(nets.made(kind), data, nets.loss_of, kind.dims, UPDATES["sgd"], clip=clip, **more)


@every_way
def test_the_loop_takes_the_steps_of_the_equations(arguments, clip, tolerance):
    weights, gemms = train(arguments, clip)
    assert distance(weights, reference(clip)) < tolerance
    assert gemms.dense == []
    assert gemms.seen == STEPS * arguments.get("gradient_accumulation_steps", 1) * (2 * len(KIND.dims) - 1)


@pytest.mark.for_the_page
def test_twelve_blocks_take_the_steps_of_the_equations(row):
    """The nets and the limit of `works_with`."""
    differences = {}
    for kind in NETS:
        weights, gemms = train(HALVES, 0.2, kind=kind)
        differences[kind.__name__] = distance(weights, reference(0.2, kind))
        assert differences[kind.__name__] < 1e-4
        assert gemms.dense == []
        assert gemms.seen >= STEPS * 2 * (2 * len(kind.dims) - 1)
    what = "Accelerate, `SparseRun`: clipped, 2 micro-batches"
    row("Trainers", what, difference=differences, tolerance=1e-4, packages=("accelerate",))


@every_way
def test_without_the_object_it_ends_elsewhere_and_warns(arguments, clip, tolerance):
    with pytest.warns(UserWarning, match="nobody attached it"):
        weights, _ = train(arguments, clip, attached=False)
    assert distance(weights, reference(clip)) > 0.3
    assert distance(weights, reference(clip, decay=0.0)) < tolerance


def test_attached_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*openwork|.*attach")
        train({}, None)


def test_what_leaves_training_is_sparse(tmp_path):
    accelerate = loop.accelerator()
    model, optimizer, loader = loop.prepared(accelerate, nets.sparse(KIND), 4)
    sparse = SparseRun(accelerate, model, optimizer)
    loop.run(accelerate, model, optimizer, loader)
    x, _ = nets.samples(KIND, 4)
    used = model.eval()(x)
    accelerate.save_state(str(tmp_path / "state"))
    plain = sparse.finish(tmp_path / "out")
    assert ow.verify(plain, pattern=ow.Selection("2:4", exclude=["head"])).sparse.keys() == KIND.dims.keys()
    assert type(plain.layers[0].linear1) is torch.nn.Linear
    for folder in ("state", "out"):
        assert torch.equal(ow.load(tmp_path / folder / FILE, into=nets.made(KIND).eval())(x), used)


def test_a_broken_promise_is_found_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "openwork.integrations.hf_accelerate.save_beside_checkpoint", lambda *_: None
    )  # which verifies as well
    accelerate = loop.accelerator()
    model, optimizer, _ = loop.prepared(accelerate, nets.sparse(KIND), 1)
    sparse = SparseRun(accelerate, model, optimizer)
    model.layers[1].linear2 = torch.nn.Linear(32, 16)  # and its mask is gone
    with pytest.raises(ow.NotSparse, match=r"layers\.1\.linear2"):
        sparse.finish(tmp_path)


def test_topology_goes_to_the_trackers(tmp_path):
    accelerate = loop.accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerate.init_trackers("run")
    logged = []
    accelerate.trackers[0].log = lambda values, step=None, **_: logged.append((step, values))
    model, optimizer, loader = loop.prepared(accelerate, nets.sparse(KIND), 6)
    SparseRun(accelerate, model, optimizer, ow.Topology(every=2))
    loop.run(accelerate, model, optimizer, loader)
    assert [step for step, _ in logged] == [2, 4, 6]
    assert logged[-1][1]["flip_rate/start"] > 0


def test_an_optimizer_that_is_not_prepared_is_told():
    accelerate, model = loop.accelerator(), nets.sparse(KIND)
    with pytest.raises(TypeError, match=r"accelerator\.prepare"):
        SparseRun(accelerate, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_it_continues_bit_for_bit(row, tmp_path):
    model, sparse = loop.resumable(tmp_path / "whole")
    script = Path(__file__).with_name("run_and_kill.py")
    assert subprocess.run([sys.executable, script, "accelerate", tmp_path / "run", "10"], check=False).returncode == -9
    for step in (4, 8):
        resumed, its_sparse = loop.resumable(tmp_path / "run", resume=step)
        assert distance(resumed.state_dict(), model.state_dict()) == 0
        assert its_sparse.topology.records == sparse.topology.records
        assert its_sparse.handle.steps == 12
    row(
        "Trainers",
        "Accelerate: killed (SIGKILL) in the middle of an epoch, resumed",
        resumes=True,
        packages=("accelerate",),
    )


def test_a_state_is_saved_while_a_schedule_runs(tmp_path):
    accelerate = loop.accelerator()
    model, optimizer, loader = loop.prepared(accelerate, nets.sparse(KIND, ow.MdGf(3)), 4)
    sparse = SparseRun(accelerate, model, optimizer)
    with pytest.warns(UserWarning, match=r"no model\.openwork\.safetensors beside .*not yet 2:4 \(step 0 of 3\)"):
        accelerate.save_state(str(tmp_path / "begin"))
    loop.run(accelerate, model, optimizer, loader)
    accelerate.save_state(str(tmp_path / "end"))
    assert not (tmp_path / "begin" / FILE).exists()
    assert (tmp_path / "end" / FILE).exists()
    sparse.finish(tmp_path)
