"""`python benchmarks/distillation.py`: time and memory of `ow.distillation_loss` beside torch's `F.kl_div`.

Forward and backward of 2,048 tokens over 49,152 words, each in a process of its own: the memory is the most that the
process held, without what it held before, in tensors of the size of the logits.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import openwork as ow

TOKENS, WORDS, TIMES = 2048, 49_152, 5


def by_torch(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.kl_div": by_torch,
    "ow.distillation_loss": ow.distillation_loss,
}


def measure(name: str) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = torch.randn(TOKENS, WORDS, requires_grad=True), torch.randn(TOKENS, WORDS)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(TIMES):
        student.grad = None
        start = time.perf_counter()
        loss = LOSSES[name](student, teacher)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    made = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (student.numel() * 4)
    times = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {TIMES} times)"
    return f"{name}: {float(loss.detach()):.6f} nats, {times}, {made:.1f} tensors of {student.numel() * 4 >> 20} MiB"


if __name__ == "__main__":
    print(f"torch {torch.__version__}, one thread")
    for name in LOSSES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (name,)))
