"""A program of a network's graph: chains of layers on bytes, everything else as it is, and what is between the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from openwork.inference.fold import as_it_was_made
from openwork.inference.program import Call, Constant, Filled, Product, Program, Ref, Step, Stored
from openwork.inference.ranges import Range
from openwork.inference.traced import Chain, Traced, chains
from openwork.ops.bytes import Form

_SHAPES = (torch.ops.aten.sym_size.int,)


def program_of(graph: Traced, model: nn.Module, layers: Mapping[str, Any], ranges: Mapping[Node, Range]) -> Program:
    """The graph with these packed layers on bytes; all others, and parameters, are those of `model`."""
    return _Assembly(graph, model, layers, ranges).program()


class _Assembly:
    """Steps as they are found. A value may be had as it is, as bytes, or both: (node, whether bytes) -> its place."""

    def __init__(self, graph: Traced, model: nn.Module, layers: Mapping[str, Any], ranges: Mapping[Node, Range]):
        self.graph, self.model, self.layers, self.ranges = graph, model, layers, ranges
        self.chains = chains(graph, layers)
        self.taken = {node for chain in self.chains.values() for node in chain.nodes} - set(self.chains)
        self.steps: list[Step] = []
        self.places: dict[tuple[Node, bool], int] = {}
        self.inputs = [node for node in graph.inputs if node is not None]
        for place, node in enumerate(self.inputs):
            self.places[node, False] = place

    def program(self) -> Program:
        for node in self.graph.nodes:
            if node in self.chains:
                self._product(self.chains[node])
            elif node in self.graph.stored:
                self._stored(node)
            elif node not in self.taken and (node, False) not in self.places:
                self._other(node)
        results = tuple(self._floats(each) if isinstance(each, Node) else each for each in self.graph.results)
        needed = _needed(self.steps, [each for each in results if type(each) is Ref])
        call = Call.of(self.graph.tree, self.graph.leaves, self.graph.any_batch)
        places = len(self.inputs) + len(self.steps)
        return Program(self.model, needed, places, call, results, self.graph.result_tree)

    def _add(self, function: Any, args: tuple[Any, ...], node: Node, is_bytes: bool = False) -> Ref:
        to = len(self.inputs) + len(self.steps)
        self.steps.append(Step(function, args, to))
        self.places[node, is_bytes] = to
        return Ref(to)

    def _floats(self, node: Node) -> Ref:
        if (node, False) in self.places:
            return Ref(self.places[node, False])
        of = self.ranges[node]
        args = (Ref(self.places[node, True]), of.scale, of.zero)
        return self._add(torch.ops.openwork.from_bytes.default, args, node)

    def _bytes(self, node: Node) -> Ref:
        if (node, True) in self.places:
            return Ref(self.places[node, True])
        of = self.ranges[node]
        args = (Ref(self.places[node, False]), of.scale, of.zero)
        return self._add(torch.ops.openwork.to_bytes.default, args, node, is_bytes=True)

    def _product(self, chain: Chain) -> None:
        x, layer, node = self.ranges[chain.x], self.layers[chain.layer], chain.last
        args: tuple[Any, ...] = (self._bytes(chain.x),)
        form = Form(zero=x.zero, activation=chain.activation)
        if chain.residual is not None:
            args += (self._any(chain.residual),)
            if (chain.residual, False) not in self.places:
                of = self.ranges[chain.residual]
                form = form._replace(residual_zero=of.zero, residual_scale=of.scale)
        if as_bytes := self._is_wanted_as_bytes(node):
            form = form._replace(y_zero=self.ranges[node].zero, y_scale=self.ranges[node].scale)
        self._add(Product(layer, x.scale, form), args, node, as_bytes)

    def _is_wanted_as_bytes(self, node: Node) -> bool:
        """Whether a layer on bytes reads it, or nothing but additions in layers on bytes do."""
        read = [chain for chain in self.chains.values() if node in (chain.x, chain.residual)]
        if node in self.graph.results or node not in self.ranges:
            return False
        return any(node is chain.x for chain in read) or (bool(read) and set(node.users) <= self._members(read))

    def _members(self, read: list[Chain]) -> set[Node]:
        return {each for chain in read for each in chain.nodes}

    def _stored(self, node: Node) -> None:
        stored = self.graph.stored[node]
        if isinstance(stored, Tensor):
            self._add(Constant(stored), (), node)
        else:
            path, _, key = stored.rpartition(".")
            self._add(Stored(self.model.get_submodule(path), key), (), node)

    def _other(self, node: Node) -> None:
        name = self.graph.layer_of(node)
        if name and as_it_was_made(module := self.model.get_submodule(name)):
            self._add(module, (self._floats(node.args[0]),), node)  # type: ignore[arg-type]
            return
        needed = dict.fromkeys(node.all_input_nodes)
        refs = {each: self._any(each) if node.target in _SHAPES else self._floats(each) for each in needed}
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), refs.__getitem__)
        flat = not kwargs and not any(isinstance(each, list | tuple) and type(each) is not Ref for each in args)
        if flat or not refs:
            function = node.target if flat else Filled(node.target, args, kwargs, ())
            self._add(function, tuple(args) if flat else (), node)
        else:
            order = tuple(refs.values())
            self._add(Filled(node.target, args, kwargs, order), order, node)

    def _any(self, node: Node) -> Ref:
        """As it is at hand."""
        return Ref(self.places[node, True]) if (node, False) not in self.places else self._floats(node)


def _needed(steps: list[Step], results: list[Ref]) -> list[Step]:
    """The steps that the results depend on, each with the values that nobody needs after it."""
    kept: list[Step] = []
    needed = {each.place for each in results}
    for step in reversed(steps):
        if step.to in needed:
            used = {each.place for each in step.args if type(each) is Ref}
            kept.append(Step(step.function, step.args, step.to, tuple(sorted(used - needed))))
            needed |= used
    return kept[::-1]
