"""The Lightning module of a recipe: optimizer, schedule, log lines, and checkpoints that resume exactly.

Lightning alone does not resume in the middle of an epoch exactly. So the position of a run is one number, the
optimizer steps done; every process starts Lightning's loops afresh from there, with a loader for the rest of the epoch.
Checkpoints are written before a step begins, where nothing is half done.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import openwork as ow
from openwork.recipes.config import Config
from openwork.recipes.draws import batch_indices, seed_step
from openwork.recipes.models import allow_torchvision
from openwork.recipes.rundir import RunDir
from openwork.recipes.sharding import shard, share_statistics
from openwork.recipes.stepping import Batches, Stopwatch, lr_factor
from openwork.recipes.task import Task

allow_torchvision()  # lightning imports it through torchmetrics
import lightning.pytorch as pl  # noqa: E402

from openwork.recipes.strategy import build_strategy  # noqa: E402


class TaskModule(pl.LightningModule):
    def __init__(self, task: Task, net: nn.Module, config: Config, data: Any, run: RunDir) -> None:
        super().__init__()
        self.task, self.net, self.config, self.data, self.run = task, net, config, data, run
        self.step = 0
        self.steps_per_epoch = data.train_count // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size {config.batch_size} exceeds the {data.train_count} training samples; make it smaller"
            )
        self._watch = Stopwatch()
        self._losses: list[Tensor] = []
        self._restored: dict[str, Any] = {}
        self._sharded = False

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    # data

    def train_dataloader(self) -> Batches:
        c, world, rank = self.config, self.trainer.world_size, self.trainer.global_rank
        epoch, start = divmod(self.step, self.steps_per_epoch)
        take = [micro * world + rank for micro in range(c.accumulate)]
        indices = batch_indices(
            c.seed,
            epoch,
            self.data.train_count,
            c.batch_size,
            start=start,
            split=c.accumulate * world,
            take=take,
            sizes=self.task.sizes(self.data),
        )
        return Batches(indices, lambda chosen: self.data.train_batches(chosen, c.seed, epoch))

    def val_dataloader(self) -> Batches:
        mine = np.arange(self.trainer.global_rank, self.data.val_count, self.trainer.world_size)
        parts = max(1, math.ceil(len(mine) / self.task.eval_batch))
        return Batches(np.array_split(mine, parts), self.data.val_batches)

    # optimisation

    def configure_model(self) -> None:
        """Lightning calls it before the optimizer is made, again for validation, and has a mesh for FSDP2 only."""
        if self.device_mesh is not None and self.trainer.state.fn == "fit" and not self._sharded:
            shard(self.net, self.device_mesh["data_parallel"])
            self._sharded = True

    def configure_optimizers(self) -> Any:
        optimizer = self.task.optimizer(self.config, self.net)
        self.topology = ow.Topology(every=self.config.topology_every)
        self.handle = ow.attach(optimizer, self.net, topology=self.topology)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        c, each = self.config, self.steps_per_epoch
        return lr_factor(
            step, round(c.warmup * each), c.epochs * each, c.schedule, [round(drop * each) for drop in c.drops]
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.task.loss(self.net, batch)

    def on_train_start(self) -> None:
        if self._restored:
            self.handle.load_state_dict(self._restored["handle"])
        self._recorded = len(self.topology.records)

    def on_train_epoch_start(self) -> None:
        self._watch.skip()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro = batch_idx % self.config.accumulate
        if micro == 0:
            self._checkpoint_if_due()
        seed_step(self.config.seed, self.step, micro, self.trainer.global_rank)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["loss"].detach())
        if (batch_idx + 1) % self.config.accumulate:
            return
        self.step += 1
        self._watch.tick()
        if self.step % self.config.log_every == 0:
            self._log_step()
        self._losses.clear()
        self._log_topology()

    def _log_step(self) -> None:
        # Lightning divides each micro-batch's loss by their number, so the sum is the step's mean.
        loss = self.trainer.strategy.reduce(torch.stack(self._losses).sum(), reduce_op="mean")
        record = {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "train_loss": float(loss),
            "lr": self._last_lr,
        }
        self._write("metrics.jsonl", record)
        self._write("times.jsonl", {"step": self.step, "seconds": list(self._watch.seconds)})
        self._watch.seconds.clear()
        self._tensorboard({"train/loss": record["train_loss"], "train/lr": record["lr"]})
        self.log("loss", record["train_loss"], prog_bar=True, logger=False)

    @property
    def _last_lr(self) -> float:
        """The rate that the step just done used: the schedule has moved on already."""
        return self.config.lr * self._lr_factor(self.step - 1)

    def _log_topology(self) -> None:
        for record in self.topology.records[self._recorded :]:
            self._write("topology.jsonl", record)
            self._tensorboard({f"topology/{key}": record[key] / record["weights"] for key in ("sad_start", "sad_step")})
        self._recorded = len(self.topology.records)

    # validation

    def on_validation_epoch_start(self) -> None:
        self._watch.skip()
        self._records: list[Any] = []
        if self._sharded:
            share_statistics(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._records += self.task.records(self.net, batch)

    def on_validation_epoch_end(self) -> None:
        self.score = self.task.score(self._gathered(), self.data)
        first = self.task.metrics[0].key
        self.log(first, self.score[first], prog_bar=True, logger=False, rank_zero_only=True)
        if self.trainer.state.fn == "fit":
            self._write(
                "metrics.jsonl", {"step": self.step, "epoch": (self.step - 1) // self.steps_per_epoch, **self.score}
            )
            self._tensorboard({f"val/{key.removeprefix('val_')}": value for key, value in self.score.items()})

    def _gathered(self) -> list[Any]:
        """The records of all processes, in the order of the samples: process r had samples r, r + world, ..."""
        world = self.trainer.world_size
        if world == 1:
            return self._records
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, self._records)
        return [parts[i % world][i // world] for i in range(sum(map(len, parts)))]

    # log lines and checkpoints

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self.run.append(name, record)

    def _tensorboard(self, values: dict[str, float]) -> None:
        if self.logger:
            self.logger.log_metrics(values, step=self.step)

    def _checkpoint_if_due(self) -> None:
        if self.step in (0, self._restored.get("step", 0)):
            return
        if self.step % self.config.checkpoint_every == 0 or self.step % self.steps_per_epoch == 0:
            draft = self.run.checkpoint.with_suffix(".part")
            self.trainer.save_checkpoint(draft, weights_only=False)
            if self.trainer.is_global_zero:
                os.replace(draft, self.run.checkpoint)
            self._watch.skip()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["openwork"] = {"step": self.step, "handle": self.handle.state_dict(), "offsets": self.run.offsets()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["openwork"]
        self.step = self._restored["step"]
        if self.trainer.is_global_zero:
            self.run.rewind(self._restored["offsets"])
        checkpoint.pop("loops")  # Lightning's loops start afresh, at the right epoch
        self.trainer.fit_loop.epoch_progress.increment_by(self.epoch)


def build_trainer(config: Config, out: Path, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Lightning's trainer; checkpoints and validation places are the module's."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return pl.Trainer(
        max_epochs=config.epochs,
        precision=config.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip or None,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=build_strategy(config),
        accelerator=config.accelerator,
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        callbacks=list(callbacks),
        default_root_dir=out,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=config.progress,
        check_val_every_n_epoch=config.validate_every,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
