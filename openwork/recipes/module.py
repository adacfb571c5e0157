"""The Lightning module of a recipe: optimizer, schedule, log lines, and checkpoints that resume exactly.

Lightning alone does not resume in the middle of an epoch exactly. So the position of a run is one number, the
optimizer steps done; every process starts Lightning's loops afresh from there, with a loader for the rest of the epoch.
Checkpoints are written before a step begins, where nothing is half done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import openwork as ow
from openwork.recipes.config import Config
from openwork.recipes.data import Data
from openwork.recipes.divergence import Diverged, bad_weights, first_cause, is_finite
from openwork.recipes.draws import batch_indices, seed_step
from openwork.recipes.mask_schedules import in_force
from openwork.recipes.models import allow_torchvision
from openwork.recipes.parallel import build_strategy, full_copy, gather, shard
from openwork.recipes.rundir import RunDir
from openwork.recipes.task import DistillableTask, Task
from openwork.utils.counted import counted
from openwork.utils.signals import Interruption

allow_torchvision()  # lightning imports it through torchmetrics
import lightning.pytorch as pl  # noqa: E402


def lr_factor(step: int, warmup: int, total: int, schedule: str = "cosine", milestones: Sequence[int] = ()) -> float:
    """Linear warm-up over `warmup` steps, then the schedule. Cosine and linear reach 0 at `total`; "steps" divides by
    ten at each milestone; "inverse-sqrt" falls with the root of the steps since the start (Vaswani et al. 2017).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1 - done
    if schedule == "steps":
        return 0.1 ** sum(step >= milestone for milestone in milestones)
    if schedule == "inverse-sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    return 1.0


class TaskModule(pl.LightningModule):
    def __init__(
        self,
        task: Task,
        net: nn.Module,
        config: Config,
        data: Data,
        run: RunDir,
        interruption: Interruption,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # In tuples they are no parts of the module: not sharded, synchronized or saved.
        self._teacher, self._full = (teacher,), (full_copy(config, net),)
        self.task, self.net, self.config, self.data, self.run = task, net, config, data, run
        self.interruption = interruption
        self.step = 0
        self.diverged: dict[str, Any] | None = None  # the first time, under --allow_nan: step and what it was
        self.steps_per_epoch = data.train_count // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size {config.batch_size} exceeds {counted(data.train_count, 'training sample')}; make "
                "it smaller"
            )
        self._last_tick: float | None = None
        self._seconds: list[float] = []  # of steps, with the loading of data, without validation and checkpoints
        self._losses: list[Tensor] = []
        self._restored: dict[str, Any] = {}
        self._sharded = False

    def train_dataloader(self) -> Any:
        c, world, rank = self.config, self.trainer.world_size, self.trainer.global_rank
        epoch, start = divmod(self.step, self.steps_per_epoch)
        take = [micro * world + rank for micro in range(c.accumulate)]
        shared: dict[str, Any] = {"start": start, "split": c.accumulate * world, "take": take, "sizes": self.data.sizes}
        indices = batch_indices(c.seed, epoch, self.data.train_count, c.batch_size, **shared)
        return self.data.train_batches(indices, c.seed, epoch)

    def val_dataloader(self) -> Any:
        return self.data.all_val_batches(self.task.eval_batch, self.trainer.global_rank, self.trainer.world_size)

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
        c, per_epoch = self.config, self.steps_per_epoch
        milestones = [round(milestone * per_epoch) for milestone in c.milestones]
        return lr_factor(step, round(c.warmup * per_epoch), c.epochs * per_epoch, c.schedule, milestones)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        if not is_finite(loss):  # before the backward pass: the weights are still those that gave it
            self._diverge(f"the loss of step {self.step + 1} is {float(loss.detach())}", batch, batch_idx)
        return loss

    def _loss(self, batch: Any) -> Tensor:
        (teacher,) = self._teacher
        if teacher is None:
            return self.task.loss(self.net, batch)
        assert isinstance(self.task, DistillableTask)
        return self.task.taught_loss(self.net, teacher, batch, self.config.teacher_weight)

    def _diverge(self, what: str, batch: Any = None, batch_idx: int = 0) -> None:
        """Stop at what is not finite and say where it came from; under --allow_nan note the first time."""
        if self.config.allow_nan:
            self.diverged = self.diverged or {"step": self.step, "what": what}
            return

        def again() -> None:
            seed_step(self.config.seed, self.step, batch_idx % self.config.accumulate, self.trainer.global_rank)
            self._loss(batch)

        cause = first_cause(self.net, batch, None if self._sharded or batch is None else again)
        raise Diverged(self.step, f"{what}: {cause}")

    def _check_weights(self) -> None:
        if bad_weights(self.net):
            self._diverge(f"the weights are not finite after step {self.step}")

    def on_train_start(self) -> None:
        self._agreement = Agreement(self.trainer.world_size)
        if self._restored:
            self.handle.load_state_dict(self._restored["handle"])
        self._recorded = len(self.topology.records)
        if self._teacher[0] is not None:
            self.trainer.precision_plugin.convert_module(self._teacher[0]).to(self.device)

    def on_train_epoch_start(self) -> None:
        self._last_tick = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro = batch_idx % self.config.accumulate
        if micro == 0:
            asked = self._agreement.any(self.interruption.signum is not None)
            self._checkpoint_if_due(asked)
            if asked:
                self.interruption.stop()
        seed_step(self.config.seed, self.step, micro, self.trainer.global_rank)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["loss"].detach())
        if (batch_idx + 1) % self.config.accumulate:
            return
        self.step += 1
        now = time.perf_counter()
        if self._last_tick is not None:
            self._seconds.append(round(now - self._last_tick, 6))
        self._last_tick = now
        if self.step % self.config.log_every == 0:
            self._log_step()
        self._losses.clear()
        self._log_topology()

    def _log_step(self) -> None:
        # Lightning divides each micro-batch's loss by their number, so the sum is the step's mean.
        loss = self.trainer.strategy.reduce(torch.stack(self._losses).sum(), reduce_op="mean")
        rate = self.config.lr * self._lr_factor(self.step - 1)  # of the step just done: the schedule has moved on
        record = {**self._place, "train_loss": float(loss), "lr": rate, **in_force(self.net)}
        self._write("metrics.jsonl", record)
        self._write("times.jsonl", {"step": self.step, "seconds": self._seconds})
        self._seconds = []
        self._tensorboard({"train/loss": record["train_loss"], "train/lr": record["lr"]})
        self.log("loss", record["train_loss"], prog_bar=True, logger=False)

    @property
    def _place(self) -> dict[str, int]:
        return {"step": self.step, "epoch": (self.step - 1) // self.steps_per_epoch}

    def _log_topology(self) -> None:
        for record in self.topology.records[self._recorded :]:
            self._write("topology.jsonl", record)
            self._tensorboard({f"topology/{key}": record[key] / record["weights"] for key in ("sad_start", "sad_step")})
        self._recorded = len(self.topology.records)

    # validation

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size == 1:  # several processes stop together, before a step
            self.interruption.check()
        self._last_tick = None
        self._predictions: list[Any] = []
        self._validated = (self.whole().eval(),)  # no part of the module, as above

    def whole(self) -> nn.Module:
        """The network as one process uses it alone: validation samples do not divide evenly, nor do translations take
        the same number of steps, and processes that share a network would wait for each other. Each of them must ask.
        """
        return gather(self.net, self._full[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.world_size == 1:
            self.interruption.check()
        if batch != ():  # of a process without a sample
            self._predictions += self.task.predictions(self._validated[0], batch)

    def on_validation_epoch_end(self) -> None:
        self.scores = self.task.compute_metrics(self._gathered(), self.data)
        if bad := [f"{key} is {value}" for key, value in self.scores.items() if not math.isfinite(value)]:
            self._diverge(f"in the validation after step {self.step} {', '.join(bad)}")
        first = self.task.metrics[0].key
        self.log(first, self.scores[first], prog_bar=True, logger=False, rank_zero_only=True)
        if self.trainer.state.fn == "fit":
            self._write("metrics.jsonl", {**self._place, **self.scores})
            self._tensorboard({f"val/{key.removeprefix('val_')}": value for key, value in self.scores.items()})

    def _gathered(self) -> list[Any]:
        """The predictions of all processes, in the order of the samples: process r had samples r, r + world, ..."""
        world = self.trainer.world_size
        if world == 1:
            return self._predictions
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, self._predictions)
        return [parts[i % world][i // world] for i in range(sum(map(len, parts)))]

    # log lines and checkpoints

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self.run.append(name, record)

    def _tensorboard(self, values: dict[str, float]) -> None:
        if self.logger:
            self.logger.log_metrics(values, step=self.step)

    def _checkpoint_if_due(self, asked: bool) -> None:
        if self.step in (0, self._restored.get("step", 0)):
            return
        if asked or self.step % self.config.checkpoint_every == 0 or self.step % self.steps_per_epoch == 0:
            self._check_weights()
            checkpoints = self.run.checkpoints
            self.trainer.save_checkpoint(checkpoints.draft, weights_only=False)
            if self.trainer.is_global_zero:
                checkpoints.commit(self.step)
            self._last_tick = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        place = {"step": self.step, "diverged": self.diverged, "offsets": self.run.offsets()}
        checkpoint["openwork"] = {**place, "handle": self.handle.state_dict()}

    def on_train_end(self) -> None:
        self._check_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["openwork"]
        self.step, self.diverged = self._restored["step"], self._restored.get("diverged")
        if self.trainer.is_global_zero:
            self.run.rewind(self._restored["offsets"])
        checkpoint.pop("loops")  # Lightning's loops start afresh, at the right epoch
        self.trainer.fit_loop.epoch_progress.increment_by(self.step // self.steps_per_epoch)


class Agreement:
    """Whether any of several processes was asked to stop: the same answer in all, a step after the first was asked."""

    def __init__(self, world: int) -> None:
        self._group = dist.new_group(backend="gloo") if world > 1 and dist.is_initialized() else None
        self._work: Any = None
        self._told = torch.tensor(0)

    def any(self, mine: bool) -> bool:
        """Each process asks once before each step. What travels is on its way during the step."""
        if self._group is None:
            return mine
        if self._work is not None:
            self._work.wait()
        answer = self._work is not None and bool(self._told)
        self._told = torch.tensor(int(mine))
        self._work = dist.all_reduce(self._told, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer


def build_trainer(config: Config, out: Path, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Lightning's trainer; checkpoints and validation places are the module's."""
    from lightning.pytorch.loggers import TensorBoardLogger

    trainer = pl.Trainer(
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
    # Its handler of SIGTERM ends the run as if it were finished, and where there are several processes it calls a
    # collective in the middle of others. `recipe.train` has its own.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
