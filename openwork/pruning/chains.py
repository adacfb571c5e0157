"""Which modules of a model are a chain: each takes what the one before returned, and else what all are given. Seen in
one forward pass."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from openwork.training.parametrize import plain_name
from openwork.training.select import Candidate
from openwork.utils.example import Call, cloned, quiet, run, tensors_of
from openwork.utils.names import join

Modules = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Chain:
    """Modules that are called one after the other, each with what the one before returned, at argument `slot` of its
    own: a place or a name. `names`: the weights to prune of each. `order`: when the first one is called."""

    blocks: Modules
    names: tuple[tuple[str, ...], ...]
    slots: tuple[int | str, ...]
    order: int

    @property
    def modules(self) -> list[nn.Module]:
        return [module for _, module in self.blocks]


@dataclass
class Probe:
    """What happened in one forward pass: when a module was first called, how often, and of the members of lists the
    last call and what came back."""

    first: dict[nn.Module, int] = field(default_factory=dict)
    times: dict[nn.Module, int] = field(default_factory=dict)
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, batch: Any) -> Probe:
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

        with quiet(model), hooks(list(model.modules()), enter, leave):
            run(model, cloned(batch))
        return probe

    def order(self, candidate: Candidate) -> int:
        """When the layer of a weight is first called, or the module around it: its forward may be another's business.
        The last of all where neither is."""
        around = self.names[candidate.module]
        called = {self.names[module]: order for module, order in self.first.items()}
        while around and around not in called:
            around = around.rpartition(".")[0]
        return called.get(around, len(called)) if around else len(called)


def find_chains(model: nn.Module, candidates: Mapping[str, Candidate], probe: Probe) -> list[Chain]:
    """The chains of most blocks that have weights to prune, none inside another."""
    made = (
        _chain(blocks, _names(model, [block for _, block in blocks], candidates), probe) for blocks in _lists(model)
    )
    found = [chain for chain in made if chain is not None]
    with_weights = [sum(map(bool, chain.names)) for chain in found]
    chosen: list[Chain] = []
    taken: set[nn.Module] = set()
    for count, chain in sorted(zip(with_weights, found, strict=True), key=lambda each: -each[0]):
        inside = {module for block in chain.modules for module in block.modules()}
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


def _chain(blocks: Modules, names: tuple[tuple[str, ...], ...], probe: Probe) -> Chain | None:
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
        slot = _slot_of(hidden_in(returned), call)
        made |= {id(tensor) for tensor in tensors_of(returned)}
        if slot is None or any(id(tensor) in made for tensor in tensors_of(put(call, slot, None))):
            return None
        slots.append(slot)
    first = hidden_of(probe.calls[modules[0]], slots[0])
    return Chain(blocks, names, tuple(slots), probe.first[modules[0]]) if isinstance(first, Tensor) else None


def _names(
    model: nn.Module, blocks: Sequence[nn.Module], candidates: Mapping[str, Candidate]
) -> tuple[tuple[str, ...], ...]:
    """The candidates inside each block, but for those of layers that stand elsewhere in the model as well."""
    inside = [set(block.modules()) for block in blocks]
    times = Counter([module for modules in inside for module in modules] + list(_outside(model, set(blocks))))
    return tuple(
        tuple(name for name, each in candidates.items() if each.module in modules and times[each.module] == 1)
        for modules in inside
    )


def _outside(module: nn.Module, blocks: Collection[nn.Module]) -> set[nn.Module]:
    """The modules that are reached without entering a block."""
    found: set[nn.Module] = set()
    left = [module]
    while left:
        each = left.pop()
        if each not in found and each not in blocks:
            found.add(each)
            left += each.children()
    return found


@contextlib.contextmanager
def hooks(modules: Sequence[nn.Module], enter: Callable[..., None], leave: Callable[..., None] | None = None) -> Any:
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    if leave is not None:
        handles += [module.register_forward_hook(leave, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_in(returned: Any) -> Any:
    """What a block returns for the next one: the tensor, or the first of several."""
    return returned[0] if isinstance(returned, tuple | list) and returned else returned


def hidden_of(call: Call, slot: int | str) -> Any:
    if isinstance(slot, str):
        return call.kwargs[slot]
    return call.args[slot] if slot < len(call.args) else None


def _slot_of(tensor: Any, call: Call) -> int | str | None:
    """Where among the arguments of a call a tensor is."""
    named: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return next((slot for slot, value in named if value is tensor), None) if isinstance(tensor, Tensor) else None


def put(call: Call, slot: int | str, value: Any) -> Call:
    """The call with another value at a slot."""
    if isinstance(slot, str):
        return Call(call.args, {**call.kwargs, slot: value})
    return Call((*call.args[:slot], value, *call.args[slot + 1 :]), call.kwargs)
