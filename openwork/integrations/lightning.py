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
from weakref import ref

import lightning.pytorch as pl

import openwork as ow
from openwork.integrations.shared import Scalars, save_compressed, verify_recorded
from openwork.training.parametrize import trained_weights


class SparseCallback(pl.Callback):
    """Attaches every optimizer that holds sparse weights, sends topology to the trainer's loggers, and at the end of
    `fit` verifies the module and saves it, compressed, beside the checkpoints: the weights that `fit` leaves, averaged
    where another callback averages them.

    Sparsify before `fit`. With several optimizers the topology is recorded at the steps of the first. `handles` travel
    in Lightning's checkpoints, which hold the dense latent weights, for resuming. The module stays sparsified after
    `fit`, so that `trainer.test(ckpt_path="best")` runs what was trained: call `ow.finalize` when done. In a further
    `fit` of the same module, also with other optimizers, records and steps go on. One callback is for one module.
    """

    def __init__(self, topology: ow.Topology | None = None):
        self.topology = topology or ow.Topology()
        self.handles: list[ow.Handle] = []
        self._restored: list[dict[str, Any]] = []
        self._module: ref[pl.LightningModule] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"handles": [_state_of(handle) for handle in self.handles] or self._restored}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict["handles"]
        self._module = None
        if self._restored and self._restored[0]["topology"]:
            self.topology.load_state_dict(self._restored[0]["topology"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        if self._module and self._module() is not pl_module:
            raise ValueError(
                f"this SparseCallback was used for another module than this {type(pl_module).__name__}: make a new one "
                "for each module, it holds the steps and the records of one"
            )
        self._module = ref(pl_module)
        sparse = [optimizer for optimizer in trainer.optimizers if trained_weights(optimizer, pl_module)]
        optimizers = sparse or trainer.optimizers[:1]
        recorders = [self.topology] + [None] * len(optimizers)
        for optimizer, recorder in zip(optimizers, recorders, strict=False):
            handle = ow.attach(optimizer, pl_module, topology=recorder)
            if state := _fitting(handle, self._restored):
                handle.load_state_dict(state)
            self.handles.append(handle)
        self._scalars = Scalars(self.topology)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if scalars := self._scalars.new():
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=self.topology.records[-1]["step"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not when training ends: other callbacks then copy their averages into the module, in any order."""
        self._release()
        verify_recorded(pl_module)
        checkpoints = trainer.checkpoint_callback
        if trainer.is_global_zero:
            save_compressed(pl_module, Path(getattr(checkpoints, "dirpath", None) or trainer.default_root_dir))

    def on_exception(self, *_: Any) -> None:
        self._release()

    def _release(self) -> None:
        """Detach the handles, and keep what they have counted for the next `fit`."""
        self._restored = self.state_dict()["handles"]
        for handle in self.handles:
            handle.detach()
        self.handles = []


def _state_of(handle: ow.Handle) -> dict[str, Any]:
    return {**handle.state_dict(), "weights": handle.weights}


def _fitting(handle: ow.Handle, states: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The state of the handle that served these weights; what records the topology goes on as that which did."""
    if handle.topology:
        return states[0] if states else None
    own = handle.weights
    return next((state for state in states if state.get("weights") == own), None)
