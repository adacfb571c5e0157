"""Hugging Face's `Trainer`: one callback.

ow.sparsify(model, "2:4", ow.SRSTE())
trainer = Trainer(model, args, train_dataset=data)
trainer.add_callback(SparseCallback(trainer))
trainer.train()                      # trainer.train(resume_from_checkpoint=True) continues exactly
trainer.save_model("out")            # exact zeros, dense names: any from_pretrained loads it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import openwork as ow
from openwork.integrations.shared import (
    Scalars,
    from_text,
    save_beside_checkpoint,
    save_compressed,
    to_text,
    verify_recorded,
)


class SparseCallback(TrainerCallback, ExportableState):
    """Attaches the trainer's optimizer, sends topology to `trainer.log`, puts a compressed file with projected weights
    into every checkpoint folder (once the method's schedule, if it has one, has ended), and at the end verifies the
    model, saves it and finalizes it.

    Sparsify the model before the `Trainer` gets it. The state of `handle` travels in trainer_state.json. Inside a
    checkpoint folder `model.safetensors` holds the dense latent weights, for resuming; after `train()` the model is
    plain, and what `trainer.save_model` writes is sparse. Callbacks that put an average into the model when training
    ends belong before this one. A further `train()` that does not resume begins new records, as the Trainer does.
    """

    def __init__(self, trainer: Trainer | None, topology: ow.Topology | None = None):
        self.trainer: Any = trainer
        self.topology = topology or ow.Topology()
        self.handle: ow.Handle | None = None

    def state(self) -> dict[str, Any]:
        saved = to_text(self.handle.state_dict()) if self.handle else ""
        return {"args": {"trainer": None}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self.trainer is None:
            raise ValueError(
                "SparseCallback was rebuilt without its trainer: set restore_callback_states_from_checkpoint=False, "
                "it finds its own state in the checkpoint"
            )
        if self.trainer.state is not state:
            raise ValueError(
                "this SparseCallback was made for another Trainer: make one for each, SparseCallback(trainer)"
            )
        if self.handle:  # of an earlier train(), whose records and steps are not this one's
            self.handle.detach()
            self.topology.begin({})
        self.handle = ow.attach(self.trainer.optimizer, self.trainer.model, topology=self.topology)
        kept: Any = state.stateful_callbacks  # what trainer_state.json holds
        saved = kept.setdefault(type(self).__name__, self.state())["attributes"]["saved"]
        if saved and state.global_step:  # it resumes
            self.handle.load_state_dict(from_text(saved))
        self._scalars = Scalars(self.topology)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if scalars := self._scalars.new():
            self.trainer.log(scalars)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if args.should_save:
            save_beside_checkpoint(self.trainer.model, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        verify_recorded(self.trainer.model)
        if args.should_save:
            save_compressed(self.trainer.model, str(args.output_dir))
        if self.handle:
            self.handle.detach()
        ow.finalize(self.trainer.model)
