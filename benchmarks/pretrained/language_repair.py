"""The repair of language.py: a pruned network is trained to give what the dense one gives.

    loss = (1 - labels) KL(dense || pruned) + labels * cross entropy
           + features * mean over the blocks of ||h - h_dense||^2 / ||h_dense||^2

The last term is SquareHead (Kurtic et al., 2023, arXiv 2310.06927): each block's output, at every token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.utils.atomic import atomic_file

_WARM_UP = 20  # steps in which the learning rate grows
_FALLING = 0.73  # share of the steps, the last ones, in which it falls to zero in a straight line
_KEEP_EVERY = 20  # steps between two checkpoints
_SCORE_EVERY = 40


@dataclass(frozen=True)
class Settings:
    """`steps` of `batch` windows of these `texts`; `lr`, the highest of all; `features`, `labels`: see the loss."""

    steps: int
    lr: float
    batch: int
    features: float
    labels: float
    seed: int
    texts: list[str]

    def lr_at(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / _WARM_UP, (self.steps - step) / (_FALLING * self.steps))


def distil(
    student: nn.Module,
    teacher: nn.Module,
    texts: Sequence[Tensor],
    settings: Settings,
    checkpoint: Path,
    score: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Train a sparsified network; embedding and head stay. Goes on from the checkpoint, if there is one, to the last
    digit. Returns the time it took and the scores on the way."""
    student.get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    ow.attach(optimizer, student)
    student.train()
    done: dict[str, Any] = {"step": 0, "cpu_seconds": 0.0, "tokens": 0, "scores": {}, "settings": asdict(settings)}
    if checkpoint.exists():
        done = resume(student, optimizer, settings, checkpoint)
    while done["step"] < settings.steps:
        start = time.process_time()
        batch = batch_at(done["step"], texts, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(done["step"])
        head, features = losses(student, teacher, batch, settings.labels)
        (head + settings.features * features).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done["step"] += 1
        done["tokens"] += batch.numel()
        done["cpu_seconds"] += time.process_time() - start
        said = f"step {done['step']} of {settings.steps}: head {head.item():.4f}, features {features.item():.4f}"
        print(f"{said}, {done['cpu_seconds']:.0f} s of CPU time", flush=True)
        last = done["step"] == settings.steps
        if last or done["step"] % _SCORE_EVERY == 0:
            done["scores"][done["step"]] = score()
            student.train()
            print(json.dumps(done["scores"][done["step"]]), flush=True)
        if last or done["step"] % _KEEP_EVERY == 0:
            keep(student, optimizer, done, checkpoint)
    return done


def losses(student: nn.Module, teacher: nn.Module, batch: Tensor, labels: float) -> tuple[Tensor, Tensor]:
    """That of the head and that of the blocks, means over the tokens: (B, T) -> numbers."""
    with torch.no_grad():
        wanted = teacher(batch, output_hidden_states=True)
    found = student(batch, output_hidden_states=True)
    logits = found.logits[:, :-1].flatten(0, 1).log_softmax(-1)
    head = (1 - labels) * F.kl_div(
        logits, wanted.logits[:, :-1].flatten(0, 1).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    if labels:
        head = head + labels * F.nll_loss(logits, batch[:, 1:].flatten())
    pairs = list(zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True))
    features = sum((a - b)[:, 1:].square().mean() / b[:, 1:].square().mean() for a, b in pairs) / len(pairs)
    return head, features


def batch_at(step: int, texts: Sequence[Tensor], settings: Settings, length: int = 512) -> Tensor:
    """Windows from anywhere, as many from each text: a function of the seed and the step alone."""
    draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    chosen = [texts[i % len(texts)] for i in range(settings.batch)]
    starts = [int(torch.randint(len(text) - length + 1, (1,), generator=draw)) for text in chosen]
    return torch.stack([text[start : start + length] for text, start in zip(chosen, starts, strict=True)])


def keep(student: nn.Module, optimizer: torch.optim.Optimizer, done: dict[str, Any], checkpoint: Path) -> None:
    with atomic_file(checkpoint) as part:
        torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict(), "done": done}, part)


def resume(
    student: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, checkpoint: Path
) -> dict[str, Any]:
    """Fill in what was kept; how far it was. Other settings are an error, but for a number of steps that changes no
    learning rate until then."""
    kept = torch.load(checkpoint, weights_only=True, mmap=True)
    done: dict[str, Any] = kept["done"]
    before = Settings(**done["settings"])
    past = range(done["step"])
    if Settings(**{**asdict(before), "steps": settings.steps}) != settings or any(
        before.lr_at(step) != settings.lr_at(step) for step in past
    ):
        raise SystemExit(f"{checkpoint} is of a run with {before} at step {done['step']}; delete it to begin anew")
    student.load_state_dict(kept["student"])
    optimizer.load_state_dict(kept["optimizer"])
    return {**done, "settings": asdict(settings)}
