"""Which weights are pruned together, in which order, and the inputs of each, computed with what was pruned before it.

Most networks are a chain of blocks: each takes what the one before returned, and else what all are given. Then only the
block itself is run again, on the outputs of the pruned one before it, and no more than the inputs of one block is held.
What stands in no chain is pruned layer by layer, and the whole model is run for each.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwork.pruning.chains import Chain, Probe, find_chains, hidden_in, hidden_of, hooks, put
from openwork.training.matmul_trace import Visit, watch
from openwork.training.select import Candidate
from openwork.utils.example import Call, cloned, quiet, run


@dataclass(frozen=True)
class Stage:
    """Weights that are pruned together. `watch(visit)` shows the products of all batches, once."""

    names: tuple[str, ...]
    watch: Callable[[Visit], None]


def stages(model: nn.Module, candidates: Mapping[str, Candidate], batches: Sequence[Any]) -> Iterator[Stage]:
    """Every candidate in one stage, in the order of the forward pass. A stage is to be pruned before the next one is
    asked for, which runs what was pruned."""
    probe = Probe.of(model, batches[0])
    chains = find_chains(model, candidates, probe)
    in_chain = {name for chain in chains for names in chain.names for name in names}
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
            watch(model, cloned(batch), visit, names=_by_id(candidates))

    return Stage(tuple(names), show)


def _by_id(candidates: Mapping[str, Candidate]) -> dict[int, str]:
    return {id(candidate.weight): name for name, candidate in candidates.items()}


def _along(
    model: nn.Module, chain: Chain, candidates: Mapping[str, Candidate], batches: Sequence[Any]
) -> Iterator[Stage]:
    """A stage for each block of a chain that has weights to prune."""
    taken = _Taken.of(model, chain, batches)
    for i, names in enumerate(chain.names):
        if names and taken is None:
            yield _whole_model(model, names, candidates, batches)
        elif names:
            yield Stage(names, lambda visit, i=i, taken=taken: taken.show(i, visit, _by_id(candidates)))  # type: ignore[misc]
        if taken is not None and i + 1 < len(chain.blocks):
            taken.go_on(i)


@dataclass
class _Taken:
    """What the blocks of a chain are given: of each batch the `hidden` tensor that goes from block to block, and the
    other arguments of each block, which they mostly share."""

    chain: Chain
    hidden: list[Tensor]
    calls: list[list[Call]]

    @classmethod
    def of(cls, model: nn.Module, chain: Chain, batches: Sequence[Any]) -> _Taken | None:
        """Run the model as far as the chain's last block. None where blocks cannot be run by themselves."""
        taken = cls(chain, [], [])
        for batch in batches:
            hidden: list[Tensor] = []
            calls: list[Call] = []

            def take(i: int, call: Call, hidden: list[Tensor] = hidden, calls: list[Call] = calls) -> Call:
                if i == 0:
                    hidden.append(hidden_of(call, chain.slots[0]).clone())
                calls.append(put(call, chain.slots[i], None))
                return call

            taken._run_model(model, batch, take)
            taken.hidden += hidden
            taken.calls.append(calls)
            if len(taken.hidden) == 1 and not taken._alone(model, batch):
                return None
        return taken

    def _run_model(self, model: nn.Module, batch: Any, enter: Callable[[int, Call], Call]) -> None:
        """Run the model as far as the last block, and let `enter` change what each block is given."""
        place = {module: i for i, module in enumerate(self.chain.modules)}

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = enter(place[module], Call(args, kwargs))
            if place[module] == len(place) - 1:
                raise _Reached
            return call.args, call.kwargs

        with quiet(model), hooks(self.chain.modules, hook), contextlib.suppress(_Reached):
            run(model, cloned(batch))

    def _alone(self, model: nn.Module, batch: Any) -> bool:
        """Whether blocks that are run by themselves are given what they are in the model, also after a change of what
        the first one is given: nothing happens between them, and their other arguments do not depend on it."""
        first, given = _changed(self.hidden[0]), list[Tensor]()

        def change(i: int, call: Call) -> Call:
            call = put(call, self.chain.slots[0], first.clone()) if i == 0 else call
            given.append(hidden_of(call, self.chain.slots[i]).clone())
            return call

        self._run_model(model, batch, change)
        try:
            for i, (before, expected) in enumerate(itertools.pairwise(given)):
                again = self._run(i, self._call(i, 0, before))
                if again.shape != expected.shape or not torch.allclose(again, expected, 1e-3, 1e-5, equal_nan=True):
                    return False
        except Exception:  # a cache that has grown, say: whatever it raises, the block is not one to run by itself
            return False
        return True

    def show(self, i: int, visit: Visit, names: Mapping[int, str]) -> None:
        """Show the products of block i on all batches."""
        for batch, hidden in enumerate(self.hidden):
            watch(self.chain.modules[i], self._call(i, batch, hidden), visit, names=names)

    def go_on(self, i: int) -> None:
        """Put what block i returns in the place of what it was given."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self._run(i, self._call(i, batch, hidden))

    def _run(self, i: int, call: Call) -> Tensor:
        block = self.chain.modules[i]
        with quiet(block):
            return hidden_in(run(block, call))

    def _call(self, i: int, batch: int, hidden: Tensor) -> Call:
        """A block may write to what it is given, so it gets a copy."""
        return put(self.calls[batch][i], self.chain.slots[i], hidden.clone())


def _changed(hidden: Tensor) -> Tensor:
    """Other numbers of the same kind: a block that takes indices gets some that exist."""
    flipped = hidden.flip(tuple(range(hidden.ndim)))
    return flipped * 1.1 if flipped.is_floating_point() else flipped


class _Reached(BaseException):
    """The last block of a chain is about to run: the rest of the model is not needed."""
