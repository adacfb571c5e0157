"""Hugging Face's Accelerate: one object for the loop that you write.

ow.sparsify(model, "2:4", ow.SRSTE())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
sparse = SparseRun(accelerator, model, optimizer)
...                                  # accelerator.backward, clip_grad_norm_, optimizer.step(): unchanged
model = sparse.finish("out")         # verified, saved, plain
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import openwork as ow
from openwork.integrations.shared import FILE, Scalars, save_beside_checkpoint, verify_recorded


class SparseRun:
    """Attaches a prepared optimizer, sends topology to `accelerator.log` at its steps, travels with `save_state` and
    `load_state`, and puts a compressed file with projected weights into every folder that `save_state` writes (once the
    method's schedule, if it has one, has ended). With several runs at a time (a GAN, a student and its teacher) each
    has a `file` of its own, numbered as Accelerate numbers its models: model.openwork.safetensors,
    model_1.openwork.safetensors.

    The model that `save_state` writes holds the dense latent weights, for resuming; what leaves training is `finish`'s.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        topology: ow.Topology | None = None,
    ):
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise TypeError(
                f"found a {type(optimizer).__name__}: hand over what accelerator.prepare(model, optimizer) returns"
            )
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(model, keep_torch_compile=False)
        self.topology = topology or ow.Topology()
        self.handle = ow.attach(optimizer, self.model, topology=self.topology)
        self.file = _file_beside(accelerator)
        self._scalars = Scalars(self.topology)
        self._hooks = [
            optimizer.optimizer.register_step_post_hook(self._log),
            accelerator.register_save_state_pre_hook(self._save_compressed),
        ]
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        return self.handle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handle.load_state_dict(state)
        self._scalars = Scalars(self.topology)

    def finish(self, folder: str | Path) -> nn.Module:
        """Verify the model, write `folder`/model.openwork.safetensors (the run's `file`), and return the model, plain.
        The optimizer is detached, and `save_state` knows the run no longer."""
        verify_recorded(self.model)
        self._save_compressed([], [], folder)
        self.handle.detach()
        for hook in self._hooks:
            hook.remove()
        registered = _registered(self.accelerator)
        registered[:] = [each for each in registered if each is not self]
        return ow.finalize(self.model)

    def _log(self, *_: Any) -> None:
        if scalars := self._scalars.new():
            self.accelerator.log(scalars, step=self.topology.records[-1]["step"])

    def _save_compressed(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str | Path) -> None:
        if self.accelerator.is_main_process:
            save_beside_checkpoint(self.model, folder, self.file)


def _registered(accelerator: Accelerator) -> list[Any]:
    """What travels with `save_state`: Accelerate has no name to take something out again."""
    registered: list[Any] = accelerator._custom_objects
    return registered


def _file_beside(accelerator: Accelerator) -> str:
    """The first name that no other run has."""
    taken = {each.file for each in _registered(accelerator) if isinstance(each, SparseRun)}
    stem, rest = FILE.split(".", 1)
    names = (FILE if number == 0 else f"{stem}_{number}.{rest}" for number in itertools.count())
    return next(name for name in names if name not in taken)
