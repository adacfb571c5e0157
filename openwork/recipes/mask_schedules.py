"""Schedules of masks as text, for flags and files, and as numbers, for curves."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from openwork.methods import DenseTail, DenseWarmup, MaskDecay, Ramp, Schedule, StructureDecay
from openwork.training.parametrize import sparse_weights

FORM = (
    "NAME=STEPS in the order of time, joined by commas: dense-warmup=N, then one of mask-decay=N[:linear], "
    "structure-decay=N[:geometric], ramp=N[:linear|cubic|cosine|exponential], and dense-tail=N, the step it begins at; "
    "or none"
)
_PARTS: dict[str, Callable[[int, str], Schedule]] = {
    "mask-decay": lambda steps, how: MaskDecay(steps, _is(how, "linear")),
    "structure-decay": lambda steps, how: StructureDecay(steps, _is(how, "geometric")),
    "ramp": lambda steps, how: Ramp(steps, how or "linear"),
}
_WARMUP, _TAIL = "dense-warmup", "dense-tail"


def parse_schedule(text: str) -> Schedule:
    """The schedule that a text names; raises ValueError where it names none.

    >>> parse_schedule("dense-warmup=100,mask-decay=400:linear")
    DenseWarmup(steps=100, then=MaskDecay(steps=400, linear=True))
    """
    if text == "none":
        return Schedule()
    parts = [_part(text, each) for each in text.split(",")]
    warmup = parts.pop(0)[1:] if parts[0][0] == _WARMUP else None
    tail = parts.pop()[1:] if parts and parts[-1][0] == _TAIL else None
    if len(parts) > 1 or any(name not in _PARTS for name, *_ in parts):
        raise ValueError(f"mask_schedule {text!r}: {FORM}")
    schedule = _PARTS[parts[0][0]](*parts[0][1:]) if parts else Schedule()
    for given, around in ((warmup, DenseWarmup), (tail, DenseTail)):
        if given:
            _is(given[1], "")
            schedule = around(given[0], schedule)
    return schedule


def _part(text: str, part: str) -> tuple[str, int, str]:
    name, equals, rest = part.strip().partition("=")
    steps, _, how = rest.partition(":")
    if not equals or not steps.isdecimal() or name not in (*_PARTS, _WARMUP, _TAIL):
        raise ValueError(f"mask_schedule {text!r}: {part.strip()!r} is no part of one; needed {FORM}")
    return name, int(steps), how


def _is(how: str, word: str) -> bool:
    if how not in ("", word):
        raise ValueError(f"mask_schedule: {how!r} is not known; needed {FORM}")
    return bool(how)


def check_length(schedule: Schedule, steps: int) -> None:
    """Raises ValueError where a run of so many steps ends before the schedule does."""
    if steps and schedule.length > steps:
        raise ValueError(
            f"{schedule} ends after step {schedule.length}, and the run has {steps} steps: make it shorter, or train "
            "longer"
        )


def in_force(net: nn.Module) -> dict[str, float]:
    """The share of the sparse weights that the schedule keeps now, and of the pruned ones that is still there; nothing
    where no schedule changes them."""
    masked = [(each.masked, each.weight.numel()) for each in sparse_weights(net) if each.masked.schedule.length]
    total = sum(count for _, count in masked)
    if not total:
        return {}
    phases = [(mask.phase, count / total) for mask, count in masked]
    kept = [each.pattern.density + (1 - each.pattern.density) * float(each.dense_groups) for each, _ in phases]
    return {
        "kept": sum(share * weight for share, (_, weight) in zip(kept, phases, strict=True)),
        "mask_decay": sum(float(phase.beta) * weight for phase, weight in phases),
    }
