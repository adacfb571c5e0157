"""A network in int8 as a whole: activations have static scales and stay bytes from layer to layer.

Which layers: all that dot products take, but for those that cost too much accuracy. What a layer costs is measured: the
network runs with this layer alone in int8. Errors of layers add up about as squares; so the largest are left out until
those of the others fit, then the network is measured as it is, and more are left out as long as it does not fit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from openwork.inference.assemble import program_of
from openwork.inference.choose import dense_variants, inputs_of, measure_layers, request_of
from openwork.inference.fold import replace
from openwork.inference.layers import Packed, pack_layer
from openwork.inference.plan import Int8Network
from openwork.inference.program import Call, Product, Program
from openwork.inference.ranges import Range, ranges_of
from openwork.inference.traced import NotTraced, Traced, chains, traced
from openwork.layouts import DotProduct
from openwork.layouts.layout import refusal_of
from openwork.nm.pattern import Pattern
from openwork.ops.bytes import MOST_TERMS, Form
from openwork.utils.example import arguments, run
from openwork.utils.timing import MARGIN, clock
from openwork.utils.torch_private import tree_leaves

_DENSE = Pattern(4, 4)
MOST_ERROR = 0.1
"""Of the size of the outputs: layers of which more would come stay float32."""


@dataclass(frozen=True)
class Calibrated:
    """A dense network as a graph, the layers that may be int8, packed, and the ranges of what lies between them."""

    dense: nn.Module
    graph: Traced
    layers: Mapping[str, Packed]
    ranges: Mapping[Node, Range]

    def program(self, names: Iterable[str]) -> Program:
        """With these layers in int8."""
        return program_of(self.graph, self.dense, {name: self.layers[name] for name in names}, self.ranges)

    def outputs(self, names: Sequence[str], example: Any) -> Tensor:
        """All floating outputs in one row, with these layers in int8."""
        with torch.no_grad():
            return _flat(run(self.program(names), example))  # type: ignore[arg-type]


def int8_network(
    dense: nn.Module, example: Any, patterns: Mapping[str, Pattern | str], batches: Sequence[Any]
) -> tuple[nn.Module | None, Int8Network]:
    """The network whose layers multiply bytes, and what was measured; None where there is none, with the reason.
    Arguments as of `calibrated`."""
    network, report = calibrated(dense, example, patterns, batches)
    return (None, report) if network is None else _assembled(network, report, example, patterns)


def calibrated(
    dense: nn.Module, example: Any, patterns: Mapping[str, Pattern | str], batches: Sequence[Any]
) -> tuple[Calibrated | None, Int8Network]:
    """What a network in int8 is made of, and which layers are, the `chosen` of the report; None where there is none.
    `dense`: plain, in eval mode, batch normalization folded. `batches`: examples to calibrate by."""
    layers, reasons = _packed(dense, example, patterns)
    if not layers:
        why = next(iter(reasons.values()), "it has no linear layer and no two-dimensional convolution")
        return None, Int8Network(reason=f"no layer is for dot products of int8: {why}")
    try:
        graph = traced(dense, example)
    except NotTraced as error:
        return None, Int8Network(reason=str(error))
    call = Call.of(graph.tree, graph.leaves, graph.any_batch)
    for batch in batches:
        if isinstance(reason := call.tensors(*arguments(dense, batch)), str):
            raise ValueError(f"calibrate: a batch does not fit the example: {reason}")
    network, unknown = _with_ranges(dense, graph, layers, batches)
    if not network.layers:
        return None, Int8Network(reason="no product of its sparse layers is in the graph")
    report = _chosen(network, batches[0], unknown)
    if not report.chosen:
        return None, Int8Network(
            report.errors, report.error, MOST_ERROR, report.float32, reason="every layer costs too much"
        )
    return network, report


def _packed(
    dense: nn.Module, example: Any, patterns: Mapping[str, Pattern | str]
) -> tuple[dict[str, Packed], dict[str, str]]:
    """The layers that dot products of int8 take, and why they do not take others. Dense ones too, as groups of four
    with none pruned, where that is faster."""
    inputs, found, reasons = inputs_of(dense, example), {}, {}
    names = Counter(id(each) for module in dense.modules() for each in module._parameters.values())
    for path, module in dense.named_modules():
        if not path or type(module) not in (nn.Linear, nn.Conv2d):
            continue
        pattern = patterns.get(f"{path}.weight")
        pattern = pattern if isinstance(pattern, Pattern) and pattern.n < pattern.m else _DENSE
        request = request_of(module, "weight", pattern, torch.int8, inputs.get(path, []), dense=True)
        reason = request if isinstance(request, str) else refusal_of(DotProduct, request)
        if names[id(module.weight)] > 1:
            reason = "its weight is that of another layer too"
        if not reason and module.weight[0].numel() * pattern.n // pattern.m > MOST_TERMS:
            reason = f"sums of more than {MOST_TERMS} products exceed 32 bits"
        if reason:
            reasons[path] = reason
            continue
        layer = pack_layer(module, pattern, DotProduct, torch.int8)
        if pattern is _DENSE and not _is_faster(module, layer, inputs[path][0]):
            reasons[path] = "dense, and as fast in float32"
        else:
            found[path] = layer
    return found, reasons


def _is_faster(module: Any, layer: Any, x: Tensor) -> bool:
    """Whether a dense layer takes less time on bytes than by the fastest of torch's ways."""
    images = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    product, whole = Product(layer, 1.0, Form()), torch.ops.openwork.to_bytes(images, 1.0, 0)
    times = clock(x.device)({**dense_variants(module, x), "bytes": lambda: product(whole)})
    return times.pop("bytes") < MARGIN * min(times.values())


def _with_ranges(
    dense: nn.Module, graph: Traced, layers: dict[str, Packed], batches: Sequence[Any]
) -> tuple[Calibrated, dict[str, str]]:
    """The network with a range for every activation that may be bytes, and the layers that have none."""
    each = [chains(graph, {name: layer}) for name, layer in layers.items()]
    ends = [chain for found in (chains(graph, layers), *each) for chain in found.values()]
    nodes = {node for chain in ends for node in (*chain.nodes, chain.x, chain.residual) if node is not None}
    ranges = ranges_of(graph, dense, batches, nodes)
    there = {chain.layer for chain in ends}
    lost = {chain.layer for chain in ends if chain.x not in ranges}
    unknown = {name: "what goes into it is not finite, or not float32" for name in layers if name in lost}
    known = {name: layer for name, layer in layers.items() if name in there - lost}
    return Calibrated(dense, graph, known, ranges), unknown


def _chosen(network: Calibrated, example: Any, unknown: Mapping[str, str]) -> Int8Network:
    """Which layers are int8, by what each costs alone and by what all of them cost."""
    exact = network.outputs([], example)
    size = float(exact.norm()) or 1.0
    errors = {name: float((network.outputs([name], example) - exact).norm()) / size for name in network.layers}
    left = sorted(errors, key=errors.__getitem__)
    out: list[str] = []
    error = 0.0
    while left:
        while left and sum(errors[name] ** 2 for name in left) ** 0.5 > MOST_ERROR:
            out.append(left.pop())
        error = float((network.outputs(left, example) - exact).norm()) / size
        if error <= MOST_ERROR:
            break
        out.append(left.pop())
    reasons = {name: f"in int8 it alone costs {errors[name]:.2g}" for name in out}
    chosen = {f"{name}.weight": DotProduct.name for name in network.layers if name in left}
    return Int8Network(
        {**errors, **dict.fromkeys(unknown, float("inf"))}, error, MOST_ERROR, {**reasons, **unknown}, chosen
    )


def _assembled(
    network: Calibrated, report: Int8Network, example: Any, patterns: Mapping[str, Pattern | str]
) -> tuple[nn.Module, Int8Network]:
    """The model itself, its layers packed, the program its forward; layers that stay float32 are sparse where that is
    faster."""
    model, dense = copy.deepcopy(network.dense), network.dense
    floats = {f"{name}.weight": patterns[f"{name}.weight"] for name in report.float32 if f"{name}.weight" in patterns}
    measured = list(measure_layers(dense, example, floats, torch.float32)) if floats else []
    packed: dict[str, Packed] = {
        timing.name.rpartition(".")[0]: layer for timing, layer in measured if layer is not None
    }
    int8 = {name: layer for name, layer in network.layers.items() if f"{name}.weight" in report.chosen}
    sparse = {name: layer for name, layer in {**packed, **int8}.items() if layer.pattern != _DENSE}
    chosen = {f"{name}.weight": layer.kind for name, layer in sparse.items()}
    for name, layer in {**packed, **int8}.items():
        replace(model, model.get_submodule(name), layer)
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    model.__dict__["forward"] = program_of(network.graph, model, int8, network.ranges)
    return model, Int8Network(report.errors, report.error, report.most_error, report.float32, chosen)


def _flat(outputs: Any) -> Tensor:
    found = [each.detach().reshape(-1) for each in tree_leaves(outputs) if isinstance(each, Tensor)]
    return torch.cat([each.double() for each in found if each.is_floating_point()])
