"""Lightning: one callback.

ow.sparsify(module.net, "2:4", ow.SRSTE())
trainer = pl.Trainer(callbacks=[SparseCallback()])
trainer.fit(module, loader)          # trainer.fit(module, loader, ckpt_path=...) continues
ow.finalize(module)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import openwork as ow
from openwork.integrations.shared import Scalars, save_compressed, verify_recorded
from openwork.training.parametrize import trained_weights


class SparseCallback(pl.Callback):
    """Attaches every optimizer that holds sparse weights, sends topology to the trainer's loggers, and at the end
    verifies the module and saves it, compressed, beside the checkpoints.

    Sparsify before `fit`. With several optimizers the topology is recorded at the steps of the first. `handles` travel
    in Lightning's checkpoints, which hold the dense latent weights, for resuming. The module stays sparsified after
    `fit`, so that `trainer.test(ckpt_path="best")` runs what was trained: call `ow.finalize` when done.
    """

    def __init__(self, topology: ow.Topology | None = None):
        self.topology = topology or ow.Topology()
        self.handles: list[ow.Handle] = []
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"handles": [handle.state_dict() for handle in self.handles] or self._restored}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict["handles"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sparse = [optimizer for optimizer in trainer.optimizers if trained_weights(optimizer, pl_module)]
        optimizers = sparse or trainer.optimizers[:1]
        recorders = [self.topology] + [None] * len(optimizers)
        self.handles = [
            ow.attach(optimizer, pl_module, topology=recorder)
            for optimizer, recorder in zip(optimizers, recorders, strict=False)
        ]
        for handle, state in zip(self.handles, self._restored, strict=bool(self._restored)):
            handle.load_state_dict(state)
        self._scalars = Scalars(self.topology)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if scalars := self._scalars.new():
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=self.topology.records[-1]["step"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        verify_recorded(pl_module)
        checkpoints = trainer.checkpoint_callback
        if trainer.is_global_zero:
            save_compressed(pl_module, Path(getattr(checkpoints, "dirpath", None) or trainer.default_root_dir))
        self._restored = self.state_dict()["handles"]
        for handle in self.handles:
            handle.detach()
        self.handles = []
