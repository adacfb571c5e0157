"""Run a method's part of training inside `optimizer.step()`: decay, schedule, hooks, topology.

The decay of pruned weights is added once per step, outside autograd, after whatever the loop did to the gradients:
unscaling, reducing, accumulating, clipping. What needs care, each tested:

- the optimizer sees the decay and `weight.grad` does not: `openwork.training.optimizer_hooks`;
- `step(closure)`: the gradients do not exist before the closure ran, so the closure is wrapped;
- a decoupled decay is no part of the gradient: the weight itself shrinks, once a step, before the optimizer's update;
- `maximize=True` turns gradients round, so the decay is turned round before;
- a fused optimizer under GradScaler receives scaled gradients and unscales them itself: the decay is scaled as well;
- a step skipped for overflow counts nothing;
- distributed checkpointing runs a step with zero gradients and learning rate 0 to create the optimizer state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.training.dtensor import full_tensor, is_sharded
from openwork.training.foreach import masks_at_end
from openwork.training.optimizer_checks import check_methods, check_own_state, check_supported, replaced, unwrapped
from openwork.training.optimizer_hooks import Hooks, call_hooks
from openwork.training.optimizer_watch import no_longer_held, same_or_around
from openwork.training.parametrize import SparseWeight, masked_modules, unwrap
from openwork.training.record import SparsityRecord, sparsity_records, weights_of
from openwork.training.topology import Topology
from openwork.utils.caller import outside


class Handle:
    """What `attach` returns. `steps` counts optimizer steps that were not skipped. To ask a GPU whether one was is to
    wait for it, so that is put off until somebody wants to know. It serves what was sparsified when it was attached:
    what is finalized it lets go of, and what is sparsified later has another handle.

    >>> import torch, openwork as ow
    >>> _ = ow.sparsify(model := torch.nn.Linear(8, 4), "2:4")
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = ow.attach(optimizer, model)
    >>> model(torch.randn(2, 8)).sum().backward()
    >>> optimizer.step()
    >>> handle.steps, handle.weights
    (1, ['weight'])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        records: list[tuple[nn.Module, SparsityRecord]],
        topology: Topology | None,
    ):
        self._steps = topology.steps if topology else 0
        self._skipped: Tensor | None = None  # of these, on the optimizer's device
        self.topology = topology
        self._optimizer, self._model = ref(optimizer), model  # the optimizer's hooks hold the handle: no circle
        self._records = records
        self._held: dict[str, Tensor] = {}  # no weak references: torch swaps no tensor that has one
        self._before: dict[str, Tensor] = {}
        self._warned = False
        methods = [record.method for _, record in records]
        self._counts = any(method.schedule.counts_steps or method.overrides("after_step") for method in methods)
        if topology:
            topology.attach(self, model, self._masks())
        for _, record in records:
            record.watch.attached[optimizer], record.cache.copied = True, False
        self.trained(optimizer)
        Hooks.of(optimizer).add(self)

    @property
    def steps(self) -> int:
        if self._skipped is not None:
            self._steps, self._skipped = self._steps - int(self._skipped), None
        return self._steps

    @property
    def unfinished(self) -> str:
        """What the weights are while the method's schedule runs: "mask decay beta = 0.31: not yet 2:4 (step 690 of
        1000)". Empty once it has ended, and where there is none."""
        return "; ".join(dict.fromkeys(each.masked.unfinished for each in self._weights() if each.masked.unfinished))

    @property
    def weights(self) -> list[str]:
        """Names of the sparse weights that the optimizer holds and this handle serves."""
        optimizer = self._optimizer()
        return [] if optimizer is None else [sparse.name for sparse in self.trained(optimizer)]

    def detach(self) -> None:
        """Take the method's part out of the optimizer's steps."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        for record in self._live():
            record.watch.attached[optimizer] = False
        self._records, self._warned = [], True
        if hooks := optimizer.__dict__.get("_openwork_hooks"):
            hooks.drop(self)

    def state_dict(self) -> dict[str, Any]:
        """Counters and topology, for an exact resume."""
        return {"steps": self.steps, "topology": self.topology.state_dict() if self.topology else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._skipped = state["steps"], None
        if self.topology and state["topology"]:
            self.topology.load_state_dict(state["topology"])
            self.topology.attach(self, self._model, self._masks())
        if self.topology:
            self.topology.steps = self._steps

    @property
    def serving(self) -> bool:
        """Whether the optimizer's steps do the method's part for anything."""
        return self._optimizer() is not None and bool(self._live())

    @property
    def finished(self) -> bool:
        """Whether it will never again have anything to do or to say."""
        return not self._live() and (self._warned or any(True for _ in masked_modules(self._model)))

    def begin_step(self, optimizer: Optimizer) -> bool:
        """Whether it takes part in the step that begins."""
        if not self._live():
            self._warn_if_finalized()
            return False
        self._before = self._masks() if self.topology and self.topology.due(self.steps + 1) else {}
        return True

    def trained(self, optimizer: Optimizer) -> list[SparseWeight]:
        """The weights that the optimizer updates, looked up anew each time: wrappers replace parameters."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = self._weights()
        trained = [sparse for sparse in weights if id(sparse.weight) in held]
        if len(trained) < len(self._held):
            self._check_held(optimizer, weights, trained)
        if [id(sparse.weight) for sparse in trained] != [id(old) for old in self._held.values()]:
            self._held |= {sparse.name: sparse.weight for sparse in trained}
        return trained

    def end_step(self, optimizer: Optimizer, trained: list[SparseWeight]) -> None:
        """Count the step, unless the optimizer skipped it for overflow."""
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        if overflow is not None and (self._counts or self.topology):
            if bool(overflow):
                return
        elif overflow is not None:
            skipped = (overflow > 0).long()
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        self._steps += 1
        if self._counts:
            for sparse in trained:
                sparse.masked.count_step(sparse.weight)
            call_hooks("after_step", optimizer, trained)
        if self.topology:
            self.topology.steps = self._steps
            if self._before:
                self.topology.record(self.steps, self._before, self._masks())

    def _live(self) -> list[SparsityRecord]:
        """The records of what is still sparsified."""
        return [record for root, record in self._records if root.__dict__.get("_openwork_record") is record]

    def _weights(self) -> list[SparseWeight]:
        return weights_of(self._model, [record for _, record in self._records])

    def _masks(self) -> dict[str, Tensor]:
        """Copies of the masks that the weights have at their patterns, wherever a schedule is. Gathered where they are
        spread over processes: one byte a weight travels, in recorded steps only."""
        weights = self._weights()
        masks = zip(weights, masks_at_end(weights), strict=True)
        return {each.name: full_tensor(mask.clone() if mask is each.masked.mask else mask) for each, mask in masks}

    def _check_held(self, optimizer: Optimizer, weights: list[SparseWeight], trained: list[SparseWeight]) -> None:
        """Fewer weights are trained than were before: raise RuntimeError where something replaced them."""
        if not trained and weights:
            raise RuntimeError(
                f"this {type(optimizer).__name__} held sparse weights of {type(self._model).__name__} when it was "
                "attached and holds none now: something replaced them in the model (load_state_dict(assign=True) or "
                "fully_shard, which must come before the optimizer is built) or in the optimizer (DeepSpeed ZeRO, "
                "which is not supported)"
            )
        if names := replaced(optimizer, self._held, {sparse.name: sparse.weight for sparse in weights}):
            raise RuntimeError(no_longer_held(optimizer, self._model, names))

    def _warn_if_finalized(self) -> None:
        if not self.finished:
            self._warned = True
            warnings.warn(
                "the model was finalized, but its optimizer still steps: its weights become dense again; "
                "call handle.detach() if that is meant, or train before ow.finalize",
                stacklevel=outside(),
            )


def attach(optimizer: Optimizer, model: nn.Module, *, topology: Topology | None = None) -> Handle:
    """Let `optimizer.step()` do the method's part for the weights of `model` that the optimizer holds.

    Call it after `sparsify` and once per optimizer; the training loop stays as it is. `model` may be wrapped in DDP or
    compiled, `optimizer` may be wrapped by Accelerate. `topology`: what records SAD at these steps. Where a further
    part of the model was sparsified since, attach that part: each handle serves its own. `finalize` ends what a handle
    does. Raises ValueError when the model is not sparsified, the optimizer holds none of its sparse weights, is
    attached already, has the state of other weights, has no learning rate where the decay is decoupled, or is LBFGS
    with a line search (which evaluates losses that lack the decay).

    >>> import torch, openwork as ow
    >>> _ = ow.sparsify(model := torch.nn.Linear(8, 4), "2:4", ow.SRSTE(decay=0.02))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = ow.attach(optimizer, model, topology=ow.Topology(every=100))
    >>> handle.weights
    ['weight']
    """
    model, optimizer = unwrap(model), unwrapped(optimizer)
    records = sparsity_records(model)
    if not records and any(masked_modules(model)):
        raise ValueError(
            f"{type(model).__name__} is only part of a sparsified model: hand ow.attach the model that ow.sparsify got"
        )
    if not records:
        raise ValueError(
            f"{type(model).__name__} is not sparsified: call ow.sparsify(model, pattern) before ow.attach; "
            "to resume a sparse run, sparsify first and then load the checkpoint"
        )
    new = [(name, root) for name, root, record in records if not _attached(record, optimizer)]
    if len(new) < len(records):
        remedy = f"; hand it the part that was sparsified since: {', '.join(name for name, _ in new)}" if new else ""
        raise ValueError(f"this {type(optimizer).__name__} is attached already: the decay would be added twice{remedy}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [sparse for sparse in weights_of(model, [record for *_, record in records]) if id(sparse.weight) in held]
    if not trained:
        raise ValueError(
            f"this {type(optimizer).__name__} holds none of the sparse weights of {type(model).__name__}; "
            "build it from model.parameters() of this very model"
        )
    check_supported(optimizer)
    check_methods(optimizer, [sparse.masked.method for sparse in trained])
    check_own_state(optimizer)
    for sparse in trained:
        if is_sharded(sparse.weight) and sparse.masked.state_names and not sparse.masked.method.shared_state:
            raise ValueError(
                f"{sparse.name} is sharded, and {sparse.masked.method} keeps {', '.join(sparse.masked.state_names)} "
                "for each weight, which is not spread with it: train without fully_shard, or with another method"
            )
        sparse.masked.reuses_mask = sparse.masked.reuses_mask and not is_sharded(sparse.weight)
    return Handle(optimizer, model, [(root, record) for _, root, record in records], topology)


def _attached(record: SparsityRecord, optimizer: Optimizer) -> bool:
    """Whether what was sparsified together is attached to this optimizer, or to one that wraps it or is in it."""
    return any(on and same_or_around(optimizer, each) for each, on in record.watch.attached.items())
