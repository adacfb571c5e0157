"""A small transformer and a residual network in Lightning take the steps of the equations."""

import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from integrations import lit, nets
from integrations.reference import STEPS, Gemms, plain_steps
from lightning.pytorch.loggers import CSVLogger
from plain_loop import UPDATES, distance
from works_with.nets import NETS

import openwork as ow
from openwork.integrations.lightning import SparseCallback
from openwork.integrations.shared import FILE

HALVES, CLIP = {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.2}
# Lightning's arguments, and the tolerance: measured 1.2e-7 for fp32, 2e-3 for bf16. Without the term both nets end
# 0.2 away.
WAYS = {
    "plain": ({}, 1e-6),
    "2 micro-batches": (HALVES, 1e-6),
    "clipped": (CLIP, 1e-6),
    "clipped, 2 micro-batches": (HALVES | CLIP, 1e-6),
    "bf16": ({"precision": "bf16-mixed"}, 1e-2),
    "bf16, clipped, 2 micro-batches": (HALVES | CLIP | {"precision": "bf16-mixed"}, 1e-2),
}
every_way = pytest.mark.parametrize(("arguments", "tolerance"), WAYS.values(), ids=WAYS)
every_net = pytest.mark.parametrize("kind", [nets.Transformer, nets.ResNet])
HARDEST = "clipped, 2 micro-batches"


def train(kind, out, arguments, callbacks):
    """The dense weights after the last step, and what every product read."""
    module = lit.Module(nets.sparse(kind))
    size = nets.BATCH // arguments.get("accumulate_grad_batches", 1)
    with Gemms(nets.shapes(kind)) as gemms:
        lit.trainer(out, callbacks, **arguments).fit(module, lit.loader(kind, STEPS, size))
    return module.net.state_dict(), gemms


def reference(kind, arguments, **more):
    clip = arguments.get("gradient_clip_val")
    data = nets.batches(kind, STEPS)
    return plain_steps(nets.made(kind), data, nets.loss_of, kind.dims, UPDATES["sgd"], clip=clip, **more)


@every_net
@every_way
def test_lightning_takes_the_steps_of_the_equations(tmp_path, kind, arguments, tolerance):
    weights, gemms = train(kind, tmp_path, arguments, [SparseCallback()])
    assert distance(weights, reference(kind, arguments)) < tolerance
    assert gemms.dense == []
    # forward, and backward to the input; the transformer's input asks for no gradient
    each_batch = 2 * len(kind.dims) - (kind is nets.Transformer)
    assert gemms.seen == STEPS * arguments.get("accumulate_grad_batches", 1) * each_batch


@pytest.mark.for_the_page
def test_twelve_blocks_take_the_steps_of_the_equations(row, tmp_path):
    """The nets and the limit of `works_with`."""
    differences, (arguments, _) = {}, WAYS[HARDEST]
    for kind in NETS:
        weights, gemms = train(kind, tmp_path, arguments, [SparseCallback()])
        differences[kind.__name__] = distance(weights, reference(kind, arguments))
        assert differences[kind.__name__] < 1e-4
        assert gemms.dense == []
        assert gemms.seen >= STEPS * 2 * (2 * len(kind.dims) - 1)
    what = f"Lightning, `SparseCallback`: {HARDEST}"
    row("Trainers", what, difference=differences, tolerance=1e-4, packages=("lightning",))


@every_net
@every_way
def test_without_the_callback_it_ends_elsewhere_and_warns(tmp_path, kind, arguments, tolerance):
    with pytest.warns(UserWarning, match="nobody attached it"):
        weights, _ = train(kind, tmp_path, arguments, [])
    assert distance(weights, reference(kind, arguments)) > 0.2
    assert distance(weights, reference(kind, arguments, decay=0.0)) < tolerance


def fit(module, out, callbacks, steps=4, **more):
    trainer = lit.trainer(out, callbacks, **more)
    trainer.fit(module, lit.loader(nets.ResNet, steps))
    return trainer


def test_attached_there_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*openwork|.*attach")
        fit(lit.Module(nets.sparse(nets.ResNet)), tmp_path, [SparseCallback()])


def test_topology_goes_to_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    callback = SparseCallback(ow.Topology(every=2))
    fit(lit.Module(nets.sparse(nets.ResNet)), tmp_path, [callback], steps=6, logger=loggers, log_every_n_steps=1)
    for logger in loggers:
        logged = [each for each in logger.experiment.metrics if "sad/start" in each]
        logged = logged or [line for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines() if line]
        assert "sad/start" in str(logged[0])
    written = Path(loggers[0].log_dir, "metrics.csv").read_text()
    assert len(written.splitlines()) == 4  # the head, steps 2, 4 and 6


def test_the_compressed_file_holds_the_final_net(tmp_path):
    module = lit.Module(nets.sparse(nets.ResNet))
    fit(module, tmp_path, [SparseCallback()])
    loaded = ow.load(tmp_path / FILE, into=lit.Module(nets.made(nets.ResNet)))
    x, _ = nets.samples(nets.ResNet, 4)
    assert torch.equal(loaded.net(x), module.net(x))
    assert torch.equal(loaded.net(x), ow.finalize(module).net(x))
    assert ow.verify(loaded, pattern=ow.Selection("2:4", exclude=["net.head"])).sparse


def test_a_broken_promise_is_found_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("openwork.integrations.lightning.save_compressed", lambda *_: None)  # verifies, too
    module = lit.Module(nets.sparse(nets.ResNet))
    module.net.two = torch.nn.Conv2d(16, 16, 1)  # and its mask is gone
    with pytest.raises(ow.NotSparse, match=r"two\.weight"):
        fit(module, tmp_path, [SparseCallback()])


class TwoOptimizers(lit.Module):
    """One for each half of the net, and one for the dense head, stepped by hand."""

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def configure_optimizers(self):
        one = [*self.net.stem.parameters(), *self.net.norm.parameters(), *self.net.one.parameters()]
        parts = one, self.net.head.parameters(), self.net.two.parameters()
        return [torch.optim.SGD(part, lr=0.03, momentum=0.9, weight_decay=0.01) for part in parts]

    def training_step(self, batch, index):
        self.zero_grad()
        self.manual_backward(nets.loss_of(self.net, batch))
        for optimizer in self.optimizers():
            optimizer.step()


def test_every_optimizer_with_sparse_weights_is_attached(tmp_path):
    module = TwoOptimizers(nets.sparse(nets.ResNet))
    callback = SparseCallback(ow.Topology(every=5))
    fit(module, tmp_path, [callback], steps=STEPS)
    assert [each["steps"] for each in callback.state_dict()["handles"]] == [STEPS, STEPS]
    assert [each["step"] for each in callback.topology.records] == [5, 10, 15, 20]
    assert distance(module.net.state_dict(), reference(nets.ResNet, {})) < 1e-6


def test_a_net_that_is_not_sparsified_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"call ow\.sparsify"):
        fit(lit.Module(nets.made(nets.ResNet)), tmp_path, [SparseCallback()])


def test_fitting_again_goes_on_counting(tmp_path):
    module, callback = lit.Module(nets.sparse(nets.ResNet)), SparseCallback(ow.Topology(every=2))
    first = fit(module, tmp_path, [callback])
    fit(module, tmp_path, [callback])
    ow.attach(first.optimizers[0], module).detach()  # it was left alone at the end
    assert [each["step"] for each in callback.topology.records] == [2, 4, 6, 8]


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_it_continues_bit_for_bit(row, tmp_path):
    """12 steps of two batches, six an epoch. With a loader that says where it is; a DataLoader does not."""
    whole, net, loader = lit.resumable(tmp_path / "whole")
    whole.fit(net, loader)
    script = Path(__file__).with_name("run_and_kill.py")
    killed = subprocess.run([sys.executable, script, "lightning", tmp_path / "run", "19"], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "run" / FILE).exists()
    for step in (4, 8):
        resumed, module, loader = lit.resumable(tmp_path / "resumed")
        resumed.fit(module, loader, ckpt_path=tmp_path / "run" / f"step={step}.ckpt")
        assert distance(module.state_dict(), net.state_dict()) == 0
        assert _sparse(resumed).topology.records == _sparse(whole).topology.records
        assert _sparse(resumed).state_dict()["handles"][0]["steps"] == 12
    row(
        "Trainers",
        "Lightning: killed (SIGKILL) in the middle of an epoch, resumed",
        resumes=True,
        packages=("lightning",),
    )


def _sparse(trainer: pl.Trainer) -> SparseCallback:
    return next(each for each in trainer.callbacks if isinstance(each, SparseCallback))
