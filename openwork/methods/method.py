"""What a method is. To add one: copy `ste.py` (nothing overridden) or `mdgf.py` (a gradient and a schedule),
write its equation on top, override what differs, add a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from openwork.methods.groups import dense_groups
from openwork.methods.schedule import EVERY_FORWARD, Phase, Schedule, shown
from openwork.nm.masks import apply_mask
from openwork.ops import foreach_mask, foreach_transposable_mask

State = Mapping[str, Tensor]
"""What a method keeps for one weight, by name: tensors that are saved beside the weight, and move and are cast with it.
The names mask, mask_age, step and pattern are the engine's."""


_RULES = ("state", "score", "mask", "forward", "backward", "fold", "before_step", "after_step")


class TrainedWeight(Protocol):
    """A weight as the hooks of the optimizer step see it."""

    weight: Tensor
    state: State

    @property
    def step(self) -> int:
        """Optimizer steps that the schedule has counted. A hook may set it, to where the schedule is to go on."""

    @step.setter
    def step(self, step: int) -> None: ...

    def mask(self) -> Tensor:
        """The mask in force: bool, the weight's shape, True means kept."""


@dataclass(frozen=True)
class Method:
    """A rule that turns a dense weight w into the weight w~ that the layer multiplies with: data, and formulas.

    A method is a frozen dataclass that states its name and what differs from this one, which is the straight-through
    estimator: of each group the N largest magnitudes are kept, w~ is 0 elsewhere, and the gradient at w~ is taken for
    that at w. Data are fields or properties:

    - `decay`: in every optimizer step, gradient += decay * w where the mask prunes;
    - `decoupled`: instead w -= lr * decay * w there, lr being the learning rate of the parameter group;
    - `schedule`: when masks are chosen, and which pattern or mask decay is in force when (`openwork.methods.schedule`);
    - `transposable`: masks are N:M along the output axis as well;
    - `sparse`: False for what only watches the mask.

    Formulas take one weight as a plain tensor, without autograd, and change none of their arguments. `mask` is boolean,
    True means kept; `phase` is what the schedule has in force; `state` is what `state` returned for this weight.

    The engine (`openwork.training`) does the rest: it stores masks, counts steps, saves and resumes all of it, and
    takes the kernel that reads a weight once where `score`, `mask`, `forward` and `backward` are those of this class.

    >>> import torch, openwork as ow
    >>> class FirstOnes(ow.Method):
    ...     name = "first-ones"
    ...     score = lambda self, weight, state: torch.arange(weight.shape[-1], 0, -1.0).expand_as(weight)
    >>> _ = ow.sparsify(layer := torch.nn.Linear(4, 1), "2:4", FirstOnes())
    >>> ow.masks(layer)["weight"]
    tensor([[ True,  True, False, False]])
    """

    name: ClassVar[str]
    """The field's name for it: "sr-ste"."""
    sparse: ClassVar[bool] = True
    transposable: ClassVar[bool] = False
    prunes_trained: ClassVar[bool] = False
    """True where the mask is chosen once, from trained weights: `openwork compare` then trains twice."""
    elementwise: ClassVar[bool] = True
    """False where `forward` looks at whole groups: weights whose groups are spread over processes are then refused."""
    whole: ClassVar[bool] = False
    """True where `forward` looks at the whole weight (`elementwise` is False then): one that is sharded is refused."""
    shared_state: ClassVar[bool] = False
    """True where the state is of the weight as a whole, such as one scale: each process that has a shard keeps it.
    Otherwise weights that are sharded are refused."""
    refused_schedules: ClassVar[tuple[type[Schedule], ...]] = ()
    """Schedules under which its formulas mean nothing."""

    # Without annotations, so that a subclass may make a field of each, with a default or without.
    decay = 0.0
    decoupled = False
    schedule = EVERY_FORWARD

    _own: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._own = frozenset(rule for rule in _RULES if getattr(cls, rule) is not getattr(Method, rule))

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule={self.schedule!r}; needed a schedule, such as ow.MaskDecay(1000)")
        for part in self.schedule.parts:
            if isinstance(part, self.refused_schedules):
                raise ValueError(f"{type(self).__name__} with {part}, which it cannot follow: use another schedule")

    def __repr__(self) -> str:
        return shown(self)

    def state(self, weight: Tensor, phase: Phase) -> State:
        """What to keep for a weight, from its values when it is sparsified, and again when its pattern is changed;
        `phase` is that of the schedule's end."""
        return {}

    def score(self, weight: Tensor, state: State) -> Tensor:
        """What the weights of a group are ranked by, non-negative; the N highest are kept."""
        return weight.abs()

    def mask(self, score: Tensor, phase: Phase) -> Tensor:
        """Which weights are kept."""
        if phase.output_axis:
            return foreach_transposable_mask([score], phase.pattern, [phase.axis], [phase.output_axis])[0]
        mask = foreach_mask([score], phase.pattern, [phase.axis])[0]
        return mask if phase.is_pattern else mask | dense_groups(score, phase)

    def forward(self, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        """The weight that the layer multiplies with. What is pruned ends as +0.0: files take -0.0 for a weight."""
        if isinstance(phase.beta, Tensor):
            return torch.where(mask, weight, weight * phase.beta)
        return apply_mask(weight, mask)

    def backward(self, gradient: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        """The gradient of the dense weight, from that of what `forward` returned."""
        return gradient

    def fold(self, weight: Tensor, mask: Tensor, phase: Phase, state: State) -> Tensor:
        """The weight of the finished model, which `finalize` and files keep; `phase` is that of the schedule's end."""
        return self.forward(weight, mask, phase, state)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise ValueError where the method cannot go with an optimizer; `attach` asks."""

    def before_step(self, optimizer: Optimizer, weights: Sequence[TrainedWeight]) -> None:
        """Called when the gradients of a step are there and the decay was added: before a step that is skipped for
        overflow too, and again after each evaluation of a closure. What it writes into `weight.grad` is for the
        optimizer alone: that is a copy, and the gradient is put back after the step. None in its place: the optimizer
        leaves the weight alone in this step."""

    def after_step(self, optimizer: Optimizer, weights: Sequence[TrainedWeight]) -> None:
        """Called after each optimizer step that was not skipped."""

    def overrides(self, *rules: str) -> bool:
        """Whether a method has formulas of its own, by name."""
        return not self._own.isdisjoint(rules)

    @property
    def ends_sparse(self) -> bool:
        """Whether the finished model is N:M."""
        return self.sparse and not self.schedule.ends_dense

    @property
    def acts_in_step(self) -> bool:
        """Whether it needs `attach`: the optimizer step adds, counts or calls something."""
        return bool(self.decay) or self.schedule.counts_steps or self.overrides("before_step", "after_step")
