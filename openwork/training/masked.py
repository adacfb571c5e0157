"""The parametrization of one weight: what a method makes of it now, and what is kept between forwards.

Sharded weights (torch's DTensor) pass through `openwork.training.dtensor`: masks are chosen on shards that hold whole
groups, or on the gathered weight; the formulas of a method see plain tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from openwork import kernels
from openwork.methods import Method, Phase
from openwork.methods.autograd import masked, straight_through
from openwork.methods.method import State
from openwork.nm.masks import apply_mask
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_prune
from openwork.training.dtensor import by_groups, check_whole_groups, differ, elementwise, full_tensor, placed_like
from openwork.training.forward_cache import ForwardCache
from openwork.utils.caller import outside
from openwork.utils.torch_private import is_traced, untraced

RESERVED = ("mask", "mask_age", "step", "pattern")
"""What follows a weight's name in a state dict already, so that no state of a method may be called so."""


class Masked(nn.Module):
    """Dense weight in, weight of the forward pass out, same shape.

    `end` is what the method's schedule comes to, `phase` what it has in force after `step` optimizer steps, `age` the
    steps since a stored mask was chosen. `seen_dtype` is the dtype in which the forward pass saw the weight (FSDP2 may
    hand it in bfloat16): the mask is a function of the weight rounded to it, so that the optimizer step and `verify`
    find the same mask. `reuses_mask`: the optimizer step takes the mask of the forward. Not of a sharded weight: each
    process ranks its part once more, instead of holding the masks of all layers. `lost`: the stored mask and state went
    with the values of the model (`to_empty`); until its next forward, which stores both, they follow the weight.
    """

    mask: Tensor | None
    assignments: ClassVar[int] = 0  # how often `load_state_dict(assign=True)` replaced a weight, of any model
    replaced: ref[Tensor] | None = None  # what the weight was before

    def __init__(self, method: Method, end: Phase, cache: ForwardCache, weight: Tensor):
        super().__init__()
        self.method, self.end, self.cache = method, end, cache
        self.seen_dtype = weight.dtype
        self.schedule = schedule = method.schedule
        self.reuses_mask = bool(method.decay) and not schedule.stores_mask
        self._ranks_by_magnitude = not method.overrides("score", "mask")
        self._straight_through = not method.overrides("forward", "backward")
        self.step = self.age = 0
        self.changed = False  # whether `end` is no longer what sparsify was given
        self.registered = self.lost = False
        self.phase = end
        self.go_to(0)
        self.mask = None  # no buffer: averages add and subtract buffers
        self._chosen_at = 0  # the weight's version
        state = method.state(weight.detach(), end)
        self.state_names = tuple(state)
        for name, tensor in state.items():
            if name in RESERVED or not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{method}.state returned {name!r}: {type(tensor).__name__}; needed a tensor for each name, and "
                    f"names other than {', '.join(RESERVED)}, which stand for the engine's own"
                )
            self.register_buffer(f"state_{name}", tensor.detach().clone())
        if schedule.stores_mask:
            self.choose_mask(weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "replaced": None}

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Masked:
        """What `to`, `half` and `to_empty` do to buffers; a mask or a state whose values did not survive is lost."""
        before = self.state
        super()._apply(function, recurse)
        self.lost = self.lost or any(differ(tensor, self.state[name]) for name, tensor in before.items())
        if (mask := self.mask) is not None:
            self.mask = function(mask)
            if type(self.mask) is Tensor:
                self.mask = self.mask.bool()  # `model.type(dtype)` casts whatever it finds
                self.lost = self.lost or differ(mask, self.mask)
        return self

    @property
    def state(self) -> State:
        """What the method keeps for the weight."""
        return {name: getattr(self, f"state_{name}") for name in self.state_names} if self.state_names else {}

    def state_of(self, weight: Tensor) -> State:
        """The state, or the one that the weight would get now where it is lost."""
        lost = self.lost and bool(self.state_names)
        return self.method.state(full_tensor(weight.detach()), self.end) if lost else self.state

    @property
    def unfinished(self) -> str:
        """What the weight is while the method's schedule runs; empty once it has ended."""
        length = self.schedule.length
        if self.step >= length:
            return ""
        if self.schedule.ends_dense:
            return f"{self.phase}: dense from step {length} on (step {self.step})"
        return f"{self.phase}: not yet {self.end.pattern} (step {self.step} of {length})"

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What torch asks when it registers a parametrization: the dense weight is the weight. Once: who moves it to
        another module (`transfer_parametrizations_and_params`, which quantization-aware training calls) leaves behind
        what `sparsify` made of the module around it."""
        if self.registered:
            raise RuntimeError(
                "the mask of a sparsified layer cannot move to another module: replace layers (quantization-aware "
                "training: prepare it) before ow.sparsify, or after ow.finalize"
            )
        self.registered = True
        return weight

    # --- the mask --------------------------------------------------------------------------------------------------

    def mask_of(self, weight: Tensor) -> Tensor:
        """The mask in force: bool, the shape of `weight`."""
        if self.mask is not None and not self.lost:
            self.follow_average(weight)
            return placed_like(self.mask, weight)
        return self.ranked(weight.detach().to(self.seen_dtype), self.phase)

    def ranked(self, weight: Tensor, phase: Phase, state: State | None = None) -> Tensor:
        """The mask that `weight` has by the method's score."""
        kept = self.state_of(weight) if state is None else state

        def choose(plain: Tensor) -> Tensor:
            return self.method.mask(self.method.score(plain, kept), phase)

        gathered = phase.output_axis is not None or isinstance(phase.dense_groups, Tensor)
        return by_groups(choose, weight, phase.axis, phase.pattern.m, gathered=gathered)

    def mask_at_end(self, weight: Tensor) -> Tensor:
        """The mask in force, or the one that the weight would have where it is pruned to its pattern."""
        in_force = not self.unfinished and not self.schedule.ends_dense
        if self.mask is not None and not self.lost and in_force:
            return self.mask_of(weight)
        return self.ranked(weight.detach().to(self.seen_dtype), self.end)

    def folds_by_pruning(self, weight: Tensor) -> bool:
        """Whether `fold` leaves the N largest magnitudes of each group and nothing else, so that who reads the weight
        can do it on the way."""
        return self.method.ends_sparse and not self.method.overrides("forward", "fold") and self.keeps_largest(weight)

    def keeps_largest(self, weight: Tensor) -> bool:
        """Whether `mask_at_end` is that of the largest magnitudes, along one axis, of a weight of the CPU."""
        ranked = self._ranks_by_magnitude and self.mask is None and self.end.output_axis is None
        return ranked and self.seen_dtype == weight.dtype and type(weight) is Tensor and weight.is_cpu

    @torch.no_grad()
    def choose_mask(self, weight: Tensor) -> None:
        """Store the mask that `weight` has now, in place, so that compiled graphs find it. Weights that are spread over
        processes are gathered for it."""
        full = full_tensor(weight.detach())
        mask = self.method.mask(self.method.score(full, self.state), self.phase)
        if self.mask is None:
            self.mask = mask.contiguous()
        else:
            self.mask.copy_(placed_like(mask, self.mask))
        self.age, self.lost = 0, False
        self.belongs_to(weight)

    def belongs_to(self, weight: Tensor) -> None:
        """The stored mask is right for what the weight is now."""
        self._chosen_at = 0 if weight.is_inference() else weight._version

    def follow_average(self, weight: Tensor) -> None:
        """Choose the stored mask of a copy anew whose weight somebody changed: that of an average, in which nobody
        counts steps. One that is chosen only once stays."""
        copied = self.cache.copied and bool(self.schedule.refresh_every)
        if not copied or torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_inference():
            return
        if weight._version != self._chosen_at:
            self.choose_mask(weight)

    def _make_anew(self, weight: Tensor) -> None:
        """Store the mask and the state that belong to the weight, after those there were are lost."""
        for name, tensor in self.restart(full_tensor(weight.detach())).items():
            setattr(self, self.buffers_saved.get(name, name), tensor)
        self.belongs_to(weight)

    # --- the forward pass ------------------------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        if self.seen_dtype != weight.dtype:
            self.seen_dtype = weight.dtype
        if self.lost and self.cache.is_running:
            self._make_anew(weight)
        return self.cache.once(self, weight, self.effective)

    def effective(self, weight: Tensor) -> Tensor:
        """The weight that the layer multiplies with, computed afresh."""
        if not self.method.sparse:
            return weight
        if not torch.compiler.is_compiling() and is_traced():
            return self._traced(weight)
        if self.is_fused(weight):
            return straight_through([weight], self.phase.pattern, [self.phase.axis])[0]
        mask = self.mask_of(weight)
        if self.reuses_mask:
            self.cache.remember(self, weight, mask)
        if not self.method.elementwise:
            check_whole_groups(weight, self.method, self.phase)
        phase, state = self.phase, self.state_of(weight)
        return elementwise(lambda w, m: masked(self.method, w, m, phase, state), weight, mask)

    def _traced(self, weight: Tensor) -> Tensor:
        """What `torch.jit.trace` records, which runs where this package is not: the mask of now, and the formula."""
        if self.training and weight.requires_grad:
            warnings.warn(
                "a trace of a sparsified model keeps the masks of now, and gradients reach only what they keep: train "
                "the model itself, and trace it in eval mode or after ow.finalize",
                stacklevel=outside(),
            )
        with untraced():
            mask = self.mask_of(weight).clone()
        return self.method.forward(weight, mask, self.phase, self.state_of(weight))

    def is_fused(self, weight: Tensor) -> bool:
        """Whether a kernel does the forward in one pass, mask included: it is that of every method."""
        return self._straight_through and self.phase.is_pattern and self.is_ranked_fused(weight)

    def is_ranked_fused(self, weight: Tensor) -> bool:
        """Whether a kernel finds the mask on the way: it is that of the largest magnitudes in the weight's own dtype,
        and is not stored."""
        ranked = self._ranks_by_magnitude and self.mask is None and self.phase.output_axis is None
        ranked = ranked and not isinstance(self.phase.dense_groups, Tensor)
        return ranked and self.seen_dtype == weight.dtype and kernels.fuses(weight)

    @torch.no_grad()
    def fold(self, weight: Tensor) -> Tensor:
        """The weight of the finished model: what the forward uses, or would use at the end of the schedule."""
        if not self.method.ends_sparse:
            return weight
        if not self.method.elementwise:
            check_whole_groups(weight, self.method, self.phase)
        if self.folds_by_pruning(weight.detach()):
            return foreach_prune([weight.detach()], self.end.pattern, [self.end.axis])[0]
        state = self.state_of(weight)
        return elementwise(lambda w, m: self.method.fold(w, m, self.end, state), weight, self.mask_at_end(weight))

    # --- the optimizer step ----------------------------------------------------------------------------------------

    def add_decay(self, target: Tensor, weight: Tensor, rate: float, factor: Tensor | None = None) -> None:
        """target += rate * factor * weight where the mask of the forward prunes, in place."""
        reused = self.cache.recall(self, weight)
        mask = self.mask_of(weight) if reused is None else reused
        decayed = elementwise(lambda w, m: apply_mask(w, ~m).mul_(rate), weight, mask)
        target.add_(decayed if factor is None else decayed.mul_(factor.to(decayed.device)))

    @torch.no_grad()
    def count_step(self, weight: Tensor) -> None:
        """An optimizer step is done: the schedule goes on; a stored mask that has served its time is chosen anew."""
        schedule, before = self.schedule, self.phase
        if schedule.length:
            self.go_to(self.step + 1)
        if self.mask is None or not schedule.counts_steps:
            return
        if self.lost:
            self._make_anew(weight)
        self.age += 1
        ramped = isinstance(before.dense_groups, Tensor) and not isinstance(self.phase.dense_groups, Tensor)
        if self.phase.pattern != before.pattern or ramped or 0 < (schedule.refresh_every or 0) <= self.age:
            self.choose_mask(weight)

    @torch.no_grad()
    def change_pattern(self, pattern: Pattern, weight: Tensor | None) -> None:
        """Go on at another pattern, where the schedule is; what is stored is made anew from the weight, or, without
        one, left to whoever loads it."""
        self.end, self.changed = replace(self.end, pattern=pattern), True
        self.go_to(self.step)
        if weight is not None:
            self.follow(weight)

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Make what is stored anew, from the weight."""
        for name, tensor in self.method.state(full_tensor(weight.detach()), self.end).items():
            self.state[name].copy_(tensor)
        if self.mask is not None:
            self.choose_mask(weight)

    def go_to(self, step: int) -> None:
        """Set the schedule to where it is after so many optimizer steps."""
        self.step = step
        self.phase = self.phase.followed_by(self.schedule.phase(step, self.end))

    # --- the state dict --------------------------------------------------------------------------------------------

    @property
    def buffers_saved(self) -> dict[str, str]:
        """Buffers saved beside the weight: what follows its name in a state dict -> the buffer here."""
        return {name: f"state_{name}" for name in self.state_names}

    @property
    def others_saved(self) -> dict[str, Tensor]:
        """The same of what is no buffer: the mask, the counters, and the pattern once it was changed."""
        schedule = self.schedule
        masks = {} if self.mask is None else {"mask": self.mask.detach()}
        ages = {"mask_age": torch.tensor(self.age)} if self.mask is not None and schedule.refresh_every else {}
        steps = {"step": torch.tensor(self.step)} if schedule.length else {}
        pattern = self.end.pattern
        return masks | ages | steps | ({"pattern": torch.tensor([pattern.n, pattern.m])} if self.changed else {})

    def saved(self) -> dict[str, Tensor]:
        """Everything that is saved beside the weight, by what follows its name."""
        return {key: getattr(self, name) for key, name in self.buffers_saved.items()} | self.others_saved

    def restart(self, weight: Tensor) -> dict[str, Tensor]:
        """Begin anew with another dense weight, and return the mask and state that belong to it, by what follows its
        name in a state dict."""
        self.age, self.lost = 0, False
        self.go_to(0)
        state = dict(self.method.state(full_tensor(weight), self.end))
        return state if self.mask is None else {**state, "mask": self.ranked(weight, self.phase, state)}

    def extra_repr(self) -> str:
        parts = [str(self.end.pattern), str(self.method), str(self.end.axis)]
        parts += [f"output_axis {self.end.output_axis}"] if self.end.output_axis else []
        return ", ".join(parts + ([self.unfinished] if self.unfinished else []))
