"""A network as a graph of operators: what `torch.export` makes of it, with the products of layers found in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from openwork.inference.fold import as_it_was_made
from openwork.ops.bytes import GELU, NONE, RELU
from openwork.utils.counted import counted
from openwork.utils.example import arguments, mapped, tensors_of
from openwork.utils.torch_private import tree_flatten, tree_map

_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
_ATEN = torch.ops.aten


class NotTraced(Exception):
    """A network cannot be had as a graph; the message says why in one line."""


@dataclass(frozen=True)
class Traced:
    """Nodes in order, without side effects. `inputs`: those of the tensors in a call, in the order of its tree `tree`;
    `stored`: names of the parameters and buffers that other nodes stand for, or constants; `results`: what is returned,
    as a tree `result_tree`. `any_batch`: dim 0 of all inputs may have another length than in the example."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node | None, ...]
    leaves: tuple[Any, ...]
    tree: Any
    stored: Mapping[Node, str | Tensor]
    results: tuple[Any, ...]
    result_tree: Any
    any_batch: bool

    def layer_of(self, node: Node) -> str:
        """The name of the layer whose product a node is; empty where it is none."""
        if node.target not in _PRODUCTS:
            return ""
        name = self.stored.get(node.args[1], "")  # type: ignore[arg-type]
        return name.removesuffix(".weight") if isinstance(name, str) and name.endswith(".weight") else ""

    def run(self, model: nn.Module, example: Any, each: Callable[[Node, Any], None]) -> list[Any]:
        """The results, in the dense network's own arithmetic; `each` is told what every node gives."""
        given, _ = tree_flatten(arguments(model, example))
        values: dict[Node, Any] = {node: x for node, x in zip(self.inputs, given, strict=True) if node is not None}
        uses = {node: len(node.users) for node in self.nodes}
        uses |= {node: uses[node] + 1 for node in self.results if isinstance(node, Node)}
        for node in self.nodes:
            if node in self.stored:
                stored = self.stored[node]
                values[node] = tensor_named(model, stored) if isinstance(stored, str) else stored
            else:
                if node not in values:
                    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                each(node, values[node])
            for before in node.all_input_nodes:
                uses[before] -= 1
                if not uses[before]:
                    del values[before]
        return [values[result] if isinstance(result, Node) else result for result in self.results]


@dataclass(frozen=True)
class Chain:
    """A layer's product and what follows it that one kernel does as well: a residual is added, then an activation."""

    layer: str
    product: Node
    x: Node
    last: Node
    residual: Node | None = None
    activation: int = NONE

    @property
    def nodes(self) -> Iterator[Node]:
        """From the last to the product."""
        node = self.last
        while node is not self.product:
            yield node
            node = next(each for each in node.all_input_nodes if each is not self.residual)
        yield node


def traced(model: nn.Module, example: Any) -> Traced:
    """The graph of a plain network in eval mode, for any batch where that can be had. Raises NotTraced."""
    if not as_it_was_made(model):
        raise NotTraced("it has hooks, or a forward of its own")
    batches = {x.shape[0] if x.ndim else None for x in tensors_of(example)}
    if len(batches) == 1 and batches != {None}:
        (batch,) = batches
        larger = example if batch != 1 else mapped(example, lambda x: torch.cat([x, x]))
        try:
            found = _exported(model, larger, any_batch=True)
        except NotTraced:
            found = None
        if found is not None and found.any_batch:
            leaves, _ = tree_flatten(arguments(model, example))
            return Traced(**{**vars(found), "leaves": tuple(leaves)})
    return _exported(model, example, any_batch=False)


def chains(graph: Traced, layers: Mapping[str, Any]) -> dict[Node, Chain]:
    """By its last node, each product of these layers with what its kernel takes in; each node is in one at most."""
    found: dict[Node, Chain] = {}
    taken: set[Node] = {result for result in graph.results if isinstance(result, Node)}
    for node in graph.nodes:
        name = graph.layer_of(node)
        if name in layers:
            chain = _extended(Chain(name, node, node.args[0], node), taken)  # type: ignore[arg-type]
            taken |= set(chain.nodes)
            found[chain.last] = chain
    return found


def tensor_named(model: nn.Module, name: str) -> Any:
    """A parameter or buffer."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters[key] if key in module._parameters else module._buffers[key]


def _extended(chain: Chain, returned: set[Node]) -> Chain:
    node = _only_user(chain.last, returned)
    if node is not None and node.target is _ATEN.add.Tensor and not node.kwargs and len(node.args) == 2:
        others = [each for each in node.args if each is not chain.last]
        if len(others) == 1 and isinstance(others[0], Node) and _alike(others[0], chain.last) and node not in returned:
            chain = Chain(chain.layer, chain.product, chain.x, node, others[0])
            node = _only_user(node, returned)
    if node is None or node in returned:
        return chain
    if node.target is _ATEN.relu.default:
        return Chain(chain.layer, chain.product, chain.x, node, chain.residual, RELU)
    if node.target is _ATEN.gelu.default and node.kwargs.get("approximate", "none") == "none" and len(node.args) == 1:
        return Chain(chain.layer, chain.product, chain.x, node, chain.residual, GELU)
    return chain


def _only_user(node: Node, returned: set[Node]) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 and node not in returned else None


def _alike(a: Node, b: Node) -> bool:
    """Whether two nodes give float32 tensors of one shape, so that nothing is broadcast."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype == torch.float32):
        return False
    return list(map(str, x.shape)) == list(map(str, y.shape))  # some lengths are symbols


def _exported(model: nn.Module, example: Any, any_batch: bool) -> Traced:
    args, kwargs = arguments(model, example)
    shapes = tree_map(lambda x: {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) else None, (args, kwargs))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # One entry for each argument of the signature, whatever it is called there.
            dynamic = (*shapes[0], *shapes[1].values()) if any_batch else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic).run_decompositions({})
    except Exception as error:  # whatever a model does that cannot be traced
        said = (str(error).strip().splitlines() or [""])[0]
        raise NotTraced(f"torch.export does not take it ({type(error).__name__}: {said})"[:200]) from error
    return _read(program, (args, kwargs), any_batch)


def _read(program: Any, call: Any, any_batch: bool) -> Traced:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise NotTraced("it changes its buffers or its inputs")
    leaves, tree = tree_flatten(call)
    if tree != program.call_spec.in_spec:
        raise NotTraced("torch.export takes its arguments in another order")
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {
        **signature.inputs_to_lifted_tensor_constants,
        **getattr(signature, "inputs_to_lifted_custom_objs", {}),
    }
    stored: dict[Node, str | Tensor] = {}
    by_name = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            stored[node] = names[node.name]
        elif node.op == "placeholder" and node.name in constants:
            stored[node] = program.constants[constants[node.name]]
        elif node.op == "placeholder":
            by_name[node.name] = node
        elif node.op not in ("call_function", "output"):
            raise NotTraced(f"its graph has {node.op} {node.target}")
    inputs = tuple(by_name.get(name) if isinstance(name, str) else None for name in _inputs(signature, leaves))
    first = [node.meta["val"].shape[0] for node in inputs if node is not None and _is_batched(node)]
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    results = tuple(output.args[0])
    return Traced(
        nodes=_needed(program.graph, results),
        inputs=inputs,
        leaves=tuple(leaves),
        tree=tree,
        stored=stored,
        results=results,
        result_tree=program.call_spec.out_spec,
        any_batch=any_batch and bool(first) and all(not isinstance(length, int) for length in first),
    )


def _inputs(signature: Any, leaves: list[Any]) -> tuple[Any, ...]:
    if len(signature.user_inputs) != len(leaves):
        raise NotTraced(f"{counted(len(leaves), 'argument')}, of which torch.export sees {len(signature.user_inputs)}")
    return tuple(signature.user_inputs)


def _is_batched(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim > 0


def _needed(graph: Any, results: tuple[Any, ...]) -> tuple[Node, ...]:
    """What the results depend on, in order. The rest is erased: checks of shapes would count as users."""
    needed = {result for result in results if isinstance(result, Node)}
    for node in reversed(list(graph.nodes)):
        if node in needed:
            needed |= set(node.all_input_nodes)
        elif node.op == "call_function":
            graph.erase_node(node)
    return tuple(node for node in graph.nodes if node in needed)
