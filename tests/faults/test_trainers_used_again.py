"""The trainers' objects used a second time, beside one another, and beside callbacks that average."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import openwork as ow

pl = pytest.importorskip("lightning.pytorch")
from integrations import loop  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging  # noqa: E402
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging  # noqa: E402

from openwork.integrations.hf_accelerate import SparseRun  # noqa: E402
from openwork.integrations.lightning import SparseCallback  # noqa: E402
from openwork.integrations.shared import FILE  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Lit(pl.LightningModule):
    """Which optimizers a fit has: each a list of layers."""

    automatic_optimization = False

    def __init__(self, *optimizers):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.parts = optimizers

    def training_step(self, batch, _):
        found = self.optimizers()
        self.manual_backward((self.net(batch[0]) - batch[0]).pow(2).mean())
        for each in found if isinstance(found, list) else [found]:
            each.step()
            each.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD([p for i in part for p in self.net[i].parameters()], 0.1) for part in self.parts]


class Automatic(Lit):
    automatic_optimization = True

    def training_step(self, batch, _):
        return (self.net(batch[0]) - batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.5)


def fit(module, callbacks, folder, epochs=1, **more):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
    )
    data = DataLoader(TensorDataset(torch.randn(32, 16)), batch_size=8)
    trainer.fit(module, data, **more)
    return trainer


FITS = [
    ([(0,)], [(0, 2)], [8]),
    ([(0,)], [(2,), (0,)], [8, 8]),
    ([(0,)], [(0,), (2,)], [8, 4]),
    ([(0,), (2,)], [(0, 2)], [8]),
    ([(2,), (0,)], [(0,), (2,)], [8, 8]),
]


@pytest.mark.parametrize(("first", "second", "steps"), FITS)
def test_a_second_fit_with_other_optimizers_goes_on(tmp_path, first, second, steps):
    module, callback, seen = Lit(*first), SparseCallback(ow.Topology(every=2)), []
    ow.sparsify(module.net, "2:4")
    fit(module, [callback], tmp_path)
    module.parts = second
    callback.on_train_batch_end = lambda *_: seen.append([handle.steps for handle in callback.handles])
    fit(module, [callback], tmp_path)
    assert seen[-1] == steps
    assert [record["step"] for record in callback.topology.records] == [2, 4, 6, 8]


def test_a_callback_is_for_one_module(tmp_path):
    modules, callback = [Lit((0, 2)), Lit((0, 2))], SparseCallback()
    for module in modules:
        ow.sparsify(module.net, "2:4")
    fit(modules[0], [callback], tmp_path)
    with pytest.raises(ValueError, match="was used for another module than this Lit: make a new one"):
        fit(modules[1], [callback], tmp_path)
    fit(modules[0], [callback], tmp_path)


def test_a_used_callback_resumes_another_module_from_a_checkpoint(tmp_path):
    callback = SparseCallback(ow.Topology(every=2))
    module = Automatic()
    ow.sparsify(module.net, "2:4")
    fit(module, [callback, ModelCheckpoint(tmp_path, filename="one")], tmp_path)
    other = Automatic()
    ow.sparsify(other.net, "2:4")
    fit(other, [callback], tmp_path, epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert [record["step"] for record in callback.topology.records] == [2, 4, 6, 8]


class Breaks(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 1:
            raise RuntimeError("on purpose")


def test_a_fit_that_failed_leaves_nothing_attached(tmp_path):
    module, callback = Automatic(), SparseCallback(ow.Topology(every=1))
    ow.sparsify(module.net, "2:4")
    optimizer = torch.optim.SGD(module.net.parameters(), 0.1)
    module.configure_optimizers = lambda: optimizer
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, [callback, Breaks()], tmp_path)
    assert not optimizer._optimizer_step_pre_hooks
    fit(module, [callback], tmp_path)
    assert [record["step"] for record in callback.topology.records] == [1, 2, 3, 4, 5, 6]


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "EMA without buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1),
}


@pytest.mark.parametrize("sparse_first", [False, True])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", [ow.SRSTE(0.02), ow.ASP(), ow.TransposableSRSTE(0.02, 3)], ids=lambda m: m.name)
def test_the_file_is_the_model_that_fit_leaves(tmp_path, method, average, sparse_first):
    module = Automatic()
    ow.sparsify(module.net, "2:4", method)
    twin = copy.deepcopy(module)
    both = [SparseCallback(), AVERAGES[average]()]
    torch.manual_seed(0)
    fit(module, both if sparse_first else both[::-1], tmp_path, epochs=3)
    torch.manual_seed(0)
    fit(twin, [SparseCallback()], tmp_path / "alone", epochs=3)
    file = ow.load_state_dict(next(tmp_path.rglob(FILE)))
    ow.finalize(module)
    assert all(torch.equal(file[name], tensor) for name, tensor in module.state_dict().items())
    assert not torch.equal(file["net.0.weight"], ow.finalize(twin).net[0].weight)


# --- Accelerate --------------------------------------------------------------------------------------------------


def run_of(accelerate, *sizes):
    model = nn.Sequential(nn.Linear(*sizes))
    ow.sparsify(model, "2:4")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return SparseRun(accelerate, *accelerate.prepare(model, optimizer))


def test_each_run_has_its_own_file(tmp_path):
    accelerate = loop.accelerator()
    runs = [run_of(accelerate, 16, 32), run_of(accelerate, 32, 8)]
    accelerate.save_state(str(tmp_path / "state"))
    for run in runs:
        run.finish(tmp_path / "out")
    for folder in ("state", "out"):
        found = {path.name: ow.load_state_dict(path) for path in (tmp_path / folder).glob("*openwork*")}
        assert {name: tuple(file["0.weight"].shape) for name, file in found.items()} == {
            FILE: (32, 16),
            "model_1.openwork.safetensors": (8, 32),
        }


def test_a_finished_run_makes_room(tmp_path):
    accelerate = loop.accelerator()
    first, second = run_of(accelerate, 16, 32), run_of(accelerate, 32, 8)
    first.finish(tmp_path)
    third = run_of(accelerate, 8, 8)
    assert [run.file for run in (first, second, third)] == [FILE, "model_1.openwork.safetensors", FILE]
    accelerate.save_state(str(tmp_path / "state"))
    assert len(list((tmp_path / "state").glob("*openwork*"))) == 2
    assert len(list((tmp_path / "state").glob("custom_checkpoint*"))) == 2


# --- transformers ------------------------------------------------------------------------------------------------


@pytest.fixture
def hf():
    pytest.importorskip("transformers")
    from integrations import hf

    return hf


def test_a_second_training_begins_new_records(hf, tmp_path):
    trainer = hf.sparse_trainer(hf.arguments(tmp_path), steps=4, topology=ow.Topology(every=2))
    (callback,) = [each for each in trainer.callback_handler.callbacks if hasattr(each, "topology")]
    for pattern in ("2:4", "1:4"):
        trainer.train()
        assert callback.handle.steps == 4
        assert [record["step"] for record in callback.topology.records] == [2, 4]
        ow.verify(trainer.model, pattern=dict.fromkeys(hf.DIMS, pattern))
        ow.sparsify(trainer.model, "1:4", ow.SRSTE(0.5))
    ow.finalize(trainer.model)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_callback_of_another_trainer_is_refused(hf, tmp_path):
    first, second = (hf.sparse_trainer(hf.arguments(tmp_path), steps=1, attached=False) for _ in range(2))
    from openwork.integrations.hf_trainer import SparseCallback

    second.add_callback(SparseCallback(first))
    with pytest.raises(ValueError, match="made for another Trainer"):
        second.train()
