"""A loop with Accelerate, for tests and for the process that is killed."""

import os
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from integrations import nets
from plain_loop import LR, MOMENTUM, WEIGHT_DECAY
from torch.utils.data import DataLoader, TensorDataset

import openwork as ow
from openwork.integrations.hf_accelerate import SparseRun


def accelerator(**more):
    """A fresh one: Accelerate keeps its settings in singletons."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **more)


def prepared(accelerate, model, steps, *, shuffle=False, kind=nets.Transformer):
    parts = accelerate.gradient_accumulation_steps
    data = TensorDataset(*nets.samples(kind, steps * nets.BATCH))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return accelerate.prepare(model, optimizer, DataLoader(data, nets.BATCH // parts, shuffle=shuffle))


def run(accelerate, model, optimizer, loader, *, clip=None, before=lambda: None, after=lambda: None):
    """The loop of Accelerate's documentation."""
    for batch in loader:
        before()
        with accelerate.accumulate(model):
            accelerate.backward(nets.loss_of(model, batch))
            if accelerate.sync_gradients and clip:
                accelerate.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if accelerate.sync_gradients:
            after()


def resumable(folder, kill_after=0, resume=0):
    """Two epochs of six steps of two batches, shuffled, with dropout; a saved state after each fourth step.

    The order is that of a seeded sampler, and every step seeds its dropout: making a DataLoader's iterator draws from
    the generator that `load_state` has just restored.
    """
    settings = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerate = accelerator(gradient_accumulation_steps=2, dataloader_config=settings)
    model, optimizer, loader = prepared(accelerate, nets.sparse(nets.Transformer, dropout=0.2), 6, shuffle=True)
    sparse = SparseRun(accelerate, model, optimizer, ow.Topology(every=1))

    def after():
        if sparse.handle.steps % 4 == 0:
            accelerate.save_state(str(Path(folder) / str(sparse.handle.steps)))
        if sparse.handle.steps == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    if resume:
        accelerate.load_state(str(Path(folder) / str(resume)))
    first, done = divmod(sparse.handle.steps, 6)
    for epoch in range(first, 2):
        rest = accelerate.skip_first_batches(loader, 2 * done) if epoch == first else loader
        rest.set_epoch(epoch)
        run(accelerate, model, optimizer, rest, before=lambda: torch.manual_seed(sparse.handle.steps), after=after)
    return model, sparse
