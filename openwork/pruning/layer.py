"""Prune one weight, given what its inputs are."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openwork.nm.masks import apply_mask, retained_share, too_dense
from openwork.pruning.inputs import Part
from openwork.pruning.magnitude import Magnitude
from openwork.pruning.refit import GivenMask
from openwork.pruning.report import PrunedWeight
from openwork.pruning.solver import Groups, Solver, diagonal, energy
from openwork.pruning.wanda import Wanda
from openwork.training.select import Candidate
from openwork.training.sparsify import magnitude_mask
from openwork.utils.counted import counted

_FEW = 4  # a matrix of K columns with fewer than K / 4 samples is not compensated: they say too little
_MOST_DAMPING = 1.0


@torch.no_grad()
def prune_weight(
    candidate: Candidate, parts: Collection[Part], solver: Solver, unseen: str = "", mask: Tensor | None = None
) -> PrunedWeight:
    """Prune a weight in place, each of its matrices by its own inputs; those of which none were seen by magnitude. A
    `mask` that is given is kept, and `solver` a `Refit` for it. Where this fails or is interrupted the weight is dense
    again."""
    dense = candidate.weight.detach().clone()
    try:
        with torch.autocast(dense.device.type, enabled=False):
            return _pruned(candidate, dense, parts, solver, unseen, mask)
    except BaseException:
        candidate.weight.detach().copy_(dense)
        raise


def _pruned(
    candidate: Candidate, dense: Tensor, parts: Collection[Part], solver: Solver, unseen: str, mask: Tensor | None
) -> PrunedWeight:
    assert candidate.pattern
    start, weight, notes = time.perf_counter(), candidate.weight.detach(), Counter[str]()
    matrices = [part.place.read(weight) for part in parts]
    seen = torch.zeros(weight.untyped_storage().nbytes() // weight.element_size(), dtype=torch.bool)
    weight.copy_(apply_mask(dense, magnitude_mask(candidate) if mask is None else mask))
    whole = masked = lost = 0.0
    for part, before in zip(parts, matrices, strict=True):
        seen_here = part.place.view(seen)
        if bool(seen_here.any()):
            notes["some of it by its last product alone: those of one forward pass overlap"] += 1
        seen_here.fill_(True)
        groups = Groups(candidate.pattern, part.place.width, candidate.output_axis is not None)
        masks = [None] * len(before) if mask is None else (part.place.read(mask) != 0)
        solved = [
            _solve(W, gram, samples, solver, groups, kept)
            for W, gram, samples, kept in zip(before, part.gram, part.samples.tolist(), masks, strict=True)
        ]
        notes.update(note for _, note in solved)
        part.place.write(weight, torch.stack([found for found, _ in solved]))
        if problem := too_dense(weight, candidate.pattern, candidate.axis):
            raise ValueError(f"{solver} on {candidate.name}: {problem}")
        for W, pruned, gram in zip(before, part.place.read(weight), part.gram, strict=True):
            whole += energy(W, gram)
            masked += energy(torch.where(pruned == 0, W, 0), gram)
            lost += energy(pruned - W, gram)
    missing = weight.numel() - int(seen.as_strided(weight.shape, weight.stride(), weight.storage_offset()).sum())
    if missing:
        share = f"{missing / weight.numel():.0%} of it " if parts else ""
        notes[f"{share}by magnitude: {unseen or 'no calibration sample reached it'}"] += 1
    return PrunedWeight(
        name=candidate.name,
        pattern=candidate.pattern,
        samples=min((int(part.samples.min()) for part in parts), default=0),
        masked=masked / whole if whole else math.nan,
        error=lost / whole if whole else math.nan,
        retained=retained_share(dense, weight != 0),
        seconds=time.perf_counter() - start,
        note="; ".join(f"{note} (x{times})" if times > 1 else note for note, times in notes.items() if note),
    )


def _solve(
    W: Tensor, gram: Tensor, samples: int, solver: Any, groups: Groups, mask: Tensor | None
) -> tuple[Tensor, str]:
    """One matrix, and what to tell where it is not what was asked for."""
    K = W.shape[1]
    blind: tuple[Solver, str] = Magnitude(), "by magnitude"
    simple: tuple[Solver, str] = Wanda(), "by Wanda"
    if mask is not None:
        blind = simple = GivenMask(mask), "not refitted"
        solver = replace(solver, mask_from=GivenMask(mask))
    if not bool(diagonal(gram).any()):
        what = "its inputs were all zero" if samples else "no calibration sample reached it"
        return blind[0].solve(W, gram, groups), f"{blind[1]}: {what}"
    if solver.needs_gram and samples * _FEW < K:
        return simple[0].solve(
            W, gram, groups
        ), f"{simple[1]}: fewer samples than a {_FEW}th of its {counted(K, 'input')}"
    note, damp = "", getattr(solver, "damp", _MOST_DAMPING)
    while True:
        found = _attempt(W, gram, solver, groups)
        if isinstance(found, Tensor):
            return found, note
        if damp >= _MOST_DAMPING:
            return simple[0].solve(W, gram, groups), f"{simple[1]}: {found}"
        damp = min(_MOST_DAMPING, 10 * damp or 1e-4)
        solver, note = replace(solver, damp=damp), f"damped by {damp:g}: {found}"


def _attempt(W: Tensor, gram: Tensor, solver: Solver, groups: Groups) -> Tensor | str:
    """What the solver finds, or why it is of no use. It may write to what it is given, a copy."""
    try:
        found = solver.solve(W.clone(), gram.clone(), groups)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return "its Gram matrix is singular"
    if not isinstance(found, Tensor) or found.shape != W.shape:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(f"{solver} gave {what}, needed a tensor of shape {tuple(W.shape)}")
    return found if bool(found.isfinite().all()) else "what the solver gave is not finite"
