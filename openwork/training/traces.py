"""What a tensor is: data, a constant, or generated in this forward; and what becomes of them in an operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from openwork.training.operands import Factor

LOOKUPS = {"embedding", "gather", "index", "index_select"}  # their first tensor is a table of whole rows
_JOINS = {"cat", "stack"}
_WRITES = {"copy", "index_copy", "index_put", "_index_put_impl", "scatter", "slice_scatter", "select_scatter"}


@dataclass(frozen=True)
class Trace:
    """What is known of the tensors in one storage.

    `names`: the parameters and buffers a constant comes from; none of a `vector`, which is no weight. `made`: by a
    product of constants. `fed`: it was handed to a module as its input, as learned queries are. `scaled`, `looked_up`:
    data had a part, but only as a factor that does not cover it, or as the indices of its rows.
    """

    constant: bool = False
    from_example: bool = False
    names: frozenset[str] = frozenset()
    made: bool = False
    fed: bool = False
    scaled: bool = False
    looked_up: bool = False
    vector: bool = False

    def __or__(self, other: Trace) -> Trace:
        return Trace(
            self.constant or other.constant,
            self.from_example or other.from_example,
            self.names | other.names,
            self.made or other.made,
            self.fed or other.fed,
            self.scaled or other.scaled,
            self.looked_up or other.looked_up,
            self.vector and other.vector,
        )

    @property
    def meets_data(self) -> bool:
        return self.scaled or self.looked_up


GENERATED, DATA, CONSTANT = Trace(), Trace(from_example=True), Trace(constant=True)
VECTOR = Trace(constant=True, vector=True)
Traced = list[tuple[Tensor, Trace]]


def is_activation(factor: Factor, trace: Trace) -> bool:
    """Whether a constant stands for data: learned queries, handed to a layer or made by one."""
    return trace.fed and (factor.place == "data" or (factor.place == "batch" and trace.made))


def after(name: str, operands: Traced, is_product: bool) -> Trace:
    """What an operator's result is."""
    traces = [trace for _, trace in operands]
    from_example = any(trace.from_example for trace in traces)
    constants = [trace for trace in traces if trace.constant]
    if is_product:
        if from_example or any(trace.meets_data for trace in constants):
            return DATA
        return replace(reduce(Trace.__or__, constants), made=True) if constants else GENERATED
    if name == "lift_fresh":  # of torch.tensor([...])
        return GENERATED
    if not constants or name in _JOINS or (from_example and name in _WRITES):
        return DATA if from_example else _joined(constants)
    if name in LOOKUPS and traces[0].constant:
        if name == "embedding" and from_example:
            return DATA
        return replace(traces[0], looked_up=traces[0].looked_up or from_example)
    if not from_example:
        is_noise = all(trace.vector for trace in constants) and len(constants) < len(traces)
        return GENERATED if is_noise else _joined(constants)
    data = [tensor for tensor, trace in operands if trace.from_example]
    scaled = [trace for tensor, trace in operands if trace.constant and _is_weight_beside(tensor, data)]
    return replace(_joined(scaled), scaled=True) if scaled else DATA


def _joined(constants: list[Trace]) -> Trace:
    return reduce(Trace.__or__, constants) if constants else GENERATED


def _is_weight_beside(constant: Tensor, data: list[Tensor]) -> bool:
    """Whether the data is only a factor of a constant of two dims or more: it is the same for some of its places. A
    table of positions is added to data that differs at all of them."""
    varying = [i for i, length in enumerate(constant.shape[::-1]) if length > 1]
    return len(varying) > 1 and not any(all(i < each.ndim and each.shape[-1 - i] > 1 for i in varying) for each in data)
