"""Which weights are pruned together, in which order, and the inputs of each, computed with what was pruned before it.

Most networks are a chain of blocks: each takes what the one before returned, and else what all are given. Then only the
block itself is run again, on the outputs of the pruned one before it, and no more than the inputs of one block is held.
What stands in no chain is pruned layer by layer, and the whole model is run for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openwork.training.matmul_trace import Visit, watch
from openwork.training.parametrize import plain_name
from openwork.training.select import Candidate
from openwork.utils.example import Call, quiet, run
from openwork.utils.names import join
from openwork.utils.torch_private import tree_leaves

Modules = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Stage:
    """Weights that are pruned together. `watch(visit)` shows the products of all batches, once."""

    names: tuple[str, ...]
    watch: Callable[[Visit], None]


@dataclass(frozen=True)
class Chain:
    """Modules that are called one after the other, each with what the one before returned, at argument `slot` of its
    own: a place or a name. `order`: when the first one is called."""

    blocks: Modules
    slots: tuple[int | str, ...]
    order: int


def stages(model: nn.Module, candidates: Mapping[str, Candidate], batches: Sequence[Any]) -> Iterator[Stage]:
    """Every candidate in one stage, in the order of the forward pass. A stage is to be pruned before the next one is
    asked for, which runs what was pruned."""
    probe = _Probe.of(model, batches[0])
    chains = _chains(model, candidates, probe)
    in_chain = {name for chain in chains for _, block in chain.blocks for name in _names(block, candidates)}
    loose: dict[int, list[str]] = {}
    for name, candidate in candidates.items():
        if name not in in_chain:
            loose.setdefault(probe.order(candidate), []).append(name)
    parts: list[tuple[int, Chain | list[str]]] = [*((chain.order, chain) for chain in chains), *loose.items()]
    del probe  # it holds what every block returned
    for _, part in sorted(parts, key=lambda each: each[0]):
        if isinstance(part, Chain):
            yield from _along(model, part, candidates, batches)
        else:
            yield _whole_model(model, part, candidates, batches)


def _whole_model(
    model: nn.Module, names: Sequence[str], candidates: Mapping[str, Candidate], batches: Sequence[Any]
) -> Stage:
    def show(visit: Visit) -> None:
        for batch in batches:
            watch(model, batch, visit, names=_by_id(candidates))

    return Stage(tuple(names), show)


def _by_id(candidates: Mapping[str, Candidate]) -> dict[int, str]:
    return {id(candidate.weight): name for name, candidate in candidates.items()}


def _along(
    model: nn.Module, chain: Chain, candidates: Mapping[str, Candidate], batches: Sequence[Any]
) -> Iterator[Stage]:
    """A stage for each block of a chain that has weights to prune."""
    taken = _Taken.of(model, chain, batches)
    for i, (_, block) in enumerate(chain.blocks):
        names = _names(block, candidates)
        if names and taken is None:
            yield _whole_model(model, names, candidates, batches)
        elif names:
            yield Stage(names, lambda visit, i=i, taken=taken: taken.show(i, visit, _by_id(candidates)))  # type: ignore[misc]
        if taken is not None and i + 1 < len(chain.blocks):
            taken.go_on(i)


def _names(block: nn.Module, candidates: Mapping[str, Candidate]) -> tuple[str, ...]:
    """The candidates inside a module."""
    inside = set(block.modules())
    return tuple(name for name, candidate in candidates.items() if candidate.module in inside)


# --- one forward pass, looked at ------------------------------------------------------------------------------------


@dataclass
class _Probe:
    """What happened in one forward pass: when a module was first called, how often, and of the members of lists the
    last call and what came back."""

    first: dict[nn.Module, int] = field(default_factory=dict)
    times: dict[nn.Module, int] = field(default_factory=dict)
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, batch: Any) -> _Probe:
        probe = cls(names={module: plain_name(name) for name, module in model.named_modules()})
        members = {block for blocks in _lists(model) for _, block in blocks}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            probe.first.setdefault(module, len(probe.first))
            probe.times[module] = probe.times.get(module, 0) + 1
            if module in members:
                probe.calls[module] = Call(args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if module in members:
                probe.outputs[module] = output

        with quiet(model), _hooks(list(model.modules()), enter, leave):
            run(model, batch)
        return probe

    def order(self, candidate: Candidate) -> int:
        """When the layer of a weight is first called, or the module around it: its forward may be another's business.
        The last of all where neither is."""
        around = self.names[candidate.module]
        called = {self.names[module]: order for module, order in self.first.items()}
        while around and around not in called:
            around = around.rpartition(".")[0]
        return called.get(around, len(called)) if around else len(called)


def _chains(model: nn.Module, candidates: Mapping[str, Candidate], probe: _Probe) -> list[Chain]:
    """The chains of most blocks that have weights to prune, none inside another."""
    found = [chain for blocks in _lists(model) if (chain := _chain(blocks, probe)) is not None]
    with_weights = [sum(bool(_names(block, candidates)) for _, block in chain.blocks) for chain in found]
    chosen: list[Chain] = []
    taken: set[nn.Module] = set()
    for count, chain in sorted(zip(with_weights, found, strict=True), key=lambda each: -each[0]):
        inside = {module for _, block in chain.blocks for module in block.modules()}
        if count > 1 and not inside & taken:
            chosen.append(chain)
            taken |= inside
    return chosen


def _lists(model: nn.Module) -> list[Modules]:
    """Lists of modules, with those in a Sequential in their place."""
    lists = [
        _members(plain_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) or _is_sequential(module)
    ]
    return [blocks for blocks in lists if len(blocks) > 1]


def _members(prefix: str, module: nn.Module) -> Modules:
    children = [(join(prefix, name), child) for name, child in module.named_children()]
    nested = [_members(name, child) if _is_sequential(child) else [(name, child)] for name, child in children]
    return [member for members in nested for member in members]


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _chain(blocks: Modules, probe: _Probe) -> Chain | None:
    """The chain that a list of modules is; None where they are called in another way, or more than once."""
    modules = [module for _, module in blocks]
    if any(probe.times.get(module) != 1 for module in modules):
        return None
    slots: list[int | str] = []
    made: set[int] = set()
    for before, block in zip([None, *modules], modules, strict=False):
        call = probe.calls[block]
        if before is None:
            slots.append(next(iter(call.kwargs), 0) if not call.args else 0)
            continue
        returned = probe.outputs[before]
        slot = _slot_of(_hidden(returned), call)
        made |= {id(leaf) for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)}
        if slot is None or any(id(leaf) in made for leaf in _leaves(_put(call, slot, None))):
            return None
        slots.append(slot)
    first = _hidden_of(probe.calls[modules[0]], slots[0])
    return Chain(blocks, tuple(slots), probe.first[modules[0]]) if isinstance(first, Tensor) else None


# --- running a chain ------------------------------------------------------------------------------------------------


@dataclass
class _Taken:
    """What the blocks of a chain are given: of each batch the `hidden` tensor that goes from block to block, and the
    other arguments of each block, which they mostly share."""

    chain: Chain
    hidden: list[Tensor]
    calls: list[list[Call]]

    @classmethod
    def of(cls, model: nn.Module, chain: Chain, batches: Sequence[Any]) -> _Taken | None:
        """Run the model as far as the chain's last block. None where a block cannot be run again by itself, because
        what it is given changes as it runs."""
        modules = [module for _, module in chain.blocks]
        slots = dict(zip(modules, chain.slots, strict=True))
        given: list[Any] = []
        calls: list[Call] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(args, kwargs)
            given.append(_hidden_of(call, slots[module]))
            calls.append(_put(call, slots[module], None))
            del given[2:]
            if module is modules[-1]:
                raise _Reached

        taken = cls(chain, [], [])
        for batch in batches:
            given.clear()
            calls.clear()
            with quiet(model), _hooks(modules, enter), contextlib.suppress(_Reached):
                run(model, batch)
            taken.hidden.append(given[0])
            taken.calls.append(list(calls))
            if len(taken.hidden) == 1 and not taken._runs_again(given[1]):
                return None
        return taken

    def _runs_again(self, expected: Tensor) -> bool:
        """Whether the first block, run twice more on the first batch, gives what it gave."""
        try:
            again = [self._run(0, 0) for _ in range(2)]
        except Exception:  # a cache that has grown, say: whatever it raises, the block is not one to run by itself
            return False
        return all(each.shape == expected.shape and torch.allclose(each, expected, 1e-3, 1e-5) for each in again)

    def show(self, i: int, visit: Visit, names: Mapping[int, str]) -> None:
        """Show the products of block i on all batches."""
        for batch in range(len(self.hidden)):
            watch(self.chain.blocks[i][1], self._call(i, batch), visit, names=names)

    def go_on(self, i: int) -> None:
        """Put what block i returns in the place of what it was given."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self._run(i, batch)

    def _run(self, i: int, batch: int) -> Tensor:
        block = self.chain.blocks[i][1]
        with quiet(block):
            return _hidden(run(block, self._call(i, batch)))

    def _call(self, i: int, batch: int) -> Call:
        """A block may write to what it is given, so it gets a copy."""
        return _put(self.calls[batch][i], self.chain.slots[i], self.hidden[batch].clone())


class _Reached(BaseException):
    """The last block of a chain is about to run: the rest of the model is not needed."""


@contextlib.contextmanager
def _hooks(modules: Sequence[nn.Module], enter: Callable[..., None], leave: Callable[..., None] | None = None) -> Any:
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    if leave is not None:
        handles += [module.register_forward_hook(leave, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(returned: Any) -> Any:
    """What a block returns for the next one: the tensor, or the first of several."""
    return returned[0] if isinstance(returned, tuple | list) and returned else returned


def _hidden_of(call: Call, slot: int | str) -> Any:
    if isinstance(slot, str):
        return call.kwargs[slot]
    return call.args[slot] if slot < len(call.args) else None


def _slot_of(tensor: Any, call: Call) -> int | str | None:
    """Where among the arguments of a call a tensor is."""
    named: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return next((slot for slot, value in named if value is tensor), None) if isinstance(tensor, Tensor) else None


def _put(call: Call, slot: int | str, value: Any) -> Call:
    """The call with another value at a slot."""
    if isinstance(slot, str):
        return Call(call.args, {**call.kwargs, slot: value})
    return Call((*call.args[:slot], value, *call.args[slot + 1 :]), call.kwargs)


def _leaves(call: Call) -> list[Any]:
    return [*tree_leaves(call.args), *tree_leaves(dict(call.kwargs))]
