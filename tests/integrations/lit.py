"""What trains a net in Lightning, for tests and for the process that is killed."""

import os
import signal

import lightning.pytorch as pl
import torch
from integrations import nets
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_loop import LR, MOMENTUM, WEIGHT_DECAY
from torch.utils.data import DataLoader, TensorDataset

import openwork as ow
from openwork.integrations.lightning import SparseCallback


class Module(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def training_step(self, batch, index):
        return nets.loss_of(self.net, batch)


class Kill(pl.Callback):
    """Ends the process as a power cut would, after `batch` batches."""

    def __init__(self, batch):
        self.left = batch

    def on_train_batch_end(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class InOrder:
    """A loader that knows where it is: Lightning saves the state of such loaders, and sets it to go on."""

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next %= len(self.batches)
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def loader(kind, steps, size=nets.BATCH):
    return DataLoader(TensorDataset(*nets.samples(kind, steps * nets.BATCH)), batch_size=size)


def trainer(out, callbacks, **more):
    return pl.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": out,
            "callbacks": callbacks,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **more,
        }
    )


def resumable(out, kill_after=0):
    """Twice 6 steps of two batches; a checkpoint after each fourth step. Returns what `fit` wants."""
    sparse = SparseCallback(ow.Topology(every=1))
    keep = ModelCheckpoint(out, "{step}", every_n_train_steps=4, save_top_k=-1)
    callbacks = [sparse, keep, *([Kill(kill_after)] if kill_after else [])]
    module = Module(nets.sparse(nets.Transformer))
    run = trainer(out, callbacks, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=True)
    return run, module, InOrder(nets.batches(nets.Transformer, 12))
