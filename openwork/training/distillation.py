"""Distillation: the divergence between what a student and its teacher predict (Hinton et al., arXiv:1503.02531).

    loss = T^2 x mean over positions of  sum_v p_v (log p_v - log q_v)     p, q = softmax of teacher / T, student / T

torch's `F.kl_div` gives the same from two log-softmaxes, and makes five tensors of the size of the logits on the way to
the gradient; of 2,048 tokens over 49,152 words each is 0.4 GB. Here nothing of that size is made but the gradient
(`benchmarks/distillation.py` measures both).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCKS = {"cpu": 1 << 18}  # logits at a time: 1 MB of float32 stays in a cache; elsewhere few launches matter more


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """The Kullback-Leibler divergence of a student's predictions from its teacher's, in nats, times the square of the
    temperature: to add to the loss of a training loop.

    Both logits are (..., classes), of any float dtype; the mean, a scalar of float32 at least, is over all positions,
    or over those where `mask` (...) is True. The gradient goes to the student alone; call the teacher in eval mode
    under `torch.no_grad()`, so that it keeps nothing for one either. Raises ValueError where the shapes differ or no
    position counts.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    >>> round(float(distillation_loss(student, teacher)), 4)
    0.3278
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the student's logits are {tuple(student_logits.shape)}, the teacher's {tuple(teacher_logits.shape)}; "
            "needed equal shapes: the same classes, or the same vocabulary, and the same input"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be greater than 0")
    positions, classes = student_logits.shape[:-1], student_logits.shape[-1]
    counted = torch.ones(positions, dtype=torch.bool, device=student_logits.device) if mask is None else mask
    if counted.shape != positions or counted.dtype != torch.bool:
        raise ValueError(
            f"mask is {tuple(counted.shape)} of {counted.dtype}; needed {tuple(positions)} of torch.bool, True where a "
            "position counts"
        )
    if not counted.any():
        raise ValueError("no position counts: the logits hold none, or mask is False everywhere")
    parts = student_logits.reshape(-1, classes), teacher_logits.detach().reshape(-1, classes), counted.flatten()
    loss: Tensor = _Divergence.apply(*parts, float(temperature))
    return loss


class _Divergence(torch.autograd.Function):
    """Logits (P, V) of both, counted (P,) -> the mean of T^2 KL over what counts. The gradient, T (q - p) / count, is
    made from the logits again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, counted)
        ctx.temperature, ctx.count = temperature, counted.sum()
        total = torch.zeros((), device=student.device)
        for rows in _blocks(student):
            log_q, log_p = (_log_softmax(logits[rows], temperature) for logits in (student, teacher))
            p = log_p.exp()
            # A class that the teacher rules out adds nothing: not 0 times infinity. (NaN is not 0, and stays.)
            divergence = torch.where(p != 0, p * (log_p - log_q), 0).sum(-1)
            total = total + divergence.where(counted[rows], 0).sum()
        return total * temperature**2 / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, counted = ctx.saved_tensors
        scale, result = gradient * ctx.temperature / ctx.count, torch.empty_like(student)
        for rows in _blocks(student):
            q, p = (_log_softmax(logits[rows], ctx.temperature).exp_() for logits in (student, teacher))
            result[rows] = q.sub_(p).mul_(scale).masked_fill_(~counted[rows, None], 0)
        return result, None, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that are looked at together."""
    rows = max(1, _BLOCKS.get(logits.device.type, 1 << 24) // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In float32, or float64 where the logits are that."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
