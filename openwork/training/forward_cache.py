"""What is computed once in a forward pass, and how to tell that a weight has changed since."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from openwork import kernels


class _StepClock:
    """Counts the optimizer steps of the process. Fused optimizers write weights without raising their version."""

    def __init__(self) -> None:
        self.steps = 0

    def tick(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.steps += 1


# Registered when openwork is imported, and for good: torch's hooks must not change while a step goes through them.
_clock = _StepClock()
register_optimizer_step_post_hook(_clock.tick)


class ForwardCache:
    """Computes each masked weight once within one forward of the root module, per grad mode.

    RAFT runs its update block 12 times in a forward, an encoder layer reads its weights 6 times. `enter` and
    `leave` are forward hooks of the root. Outside a root forward, and under `torch.compile` (which merges equal
    expressions itself), nothing is kept. Each thread has its own; copies start empty. What the last forward computed
    may be given ahead in this one (`wants`, `give`): by `ahead`, which a forward calls once it has begun. A weight that
    is changed between two reads is computed again, but for writes into `.data`, of which torch keeps no count.
    """

    def __init__(self, ahead: Callable[[nn.Module], None] | None = None, copied: bool = False) -> None:
        self._ahead, self._here = ahead, threading.local()
        self.copied = copied  # and no optimizer attached since

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardCache, (self._ahead, True)

    def remember(self, owner: object, weight: Tensor, mask: Tensor) -> None:
        """Hold the mask that a forward used until the optimizer step asks for it. Without a reference to the weight:
        `torch.utils.swap_tensors` refuses tensors that have any."""
        if not torch.compiler.is_compiling() and weight.requires_grad and torch.is_grad_enabled():
            self._masks()[id(owner)] = (id(weight), _state(weight), mask)

    def recall(self, owner: object, weight: Tensor) -> Tensor | None:
        """The mask of the forward since which this very weight has not changed, once; None if there is none."""
        kept = self._masks().pop(id(owner), None)
        return kept[2] if kept and kept[:2] == (id(weight), _state(weight)) else None

    def _masks(self) -> dict[int, tuple[int, tuple[int | None, int], Tensor]]:
        if not hasattr(self._here, "masks"):
            self._here.masks = {}
        return self._here.masks

    def enter(self, root: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._here.depth = getattr(self._here, "depth", 0) + 1
            self._here.seen = {}  # in a nested call too: what looks like a call around it may have been interrupted
            if self._ahead and getattr(self._here, "used", None):
                self._ahead(root)

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._here.depth = max(0, getattr(self._here, "depth", 0) - 1)
            if self._here.depth == 0:
                self._here.used = {key for key, (weight, *_) in self._here.seen.items() if kernels.batches(weight)}
                self._here.seen = {}

    @property
    def is_running(self) -> bool:
        """Whether a forward of the root is going on in this thread."""
        return getattr(self._here, "depth", 0) > 0

    def once(self, owner: object, weight: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(weight)`, or what it gave before in this forward for the very same weight."""
        if torch.compiler.is_compiling() or not getattr(self._here, "depth", 0):
            return compute(weight)
        known = self._here.seen.get(_key(owner))
        if known is None or known[0] is not weight or known[1] != change_of(weight):
            known = self.give(owner, weight, compute(weight))
        return known[2]

    def forget(self, owner: object) -> None:
        """Compute a weight again at its next read: it was written to in a way of which torch keeps no count."""
        self._masks().pop(id(owner), None)
        seen = getattr(self._here, "seen", {})
        for key in [key for key in seen if key[0] == id(owner)]:
            del seen[key]

    def wants(self, owner: object) -> bool:
        """Whether the last forward computed this weight in the grad mode of now, on a device that takes lists: then
        this one, which has just begun, will ask for it too."""
        return getattr(self._here, "depth", 0) > 0 and _key(owner) in getattr(self._here, "used", ())

    def give(self, owner: object, weight: Tensor, computed: Tensor) -> tuple[Tensor, object, Tensor]:
        """Keep what was computed of a weight until this forward ends."""
        known: tuple[Tensor, object, Tensor] = (weight, change_of(weight), computed)
        self._here.seen[_key(owner)] = known
        return known


def _key(owner: object) -> tuple[int, bool, bool]:
    return id(owner), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _state(weight: Tensor) -> tuple[int | None, int]:
    """What differs once a weight was changed: in place, or by `weight.data = other`, which raises no version."""
    try:
        address = weight.data_ptr()
    except RuntimeError:  # inside torch.func, where it has none
        address = 0
    return None if weight.is_inference() else weight._version, address


def change_of(weight: Tensor) -> tuple[object, ...]:
    """What stays equal as long as a weight has not changed, also for optimizers that raise no version."""
    return (*_state(weight), _clock.steps)
