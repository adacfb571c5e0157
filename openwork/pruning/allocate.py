"""Spend a budget: which layer gets which pattern, so that the least is lost. DominoSearch (Sun et al., NeurIPS 2021)
asks the same of training.

    minimize the sum over layers of error(layer, pattern), with the sum of cost(layer, pattern) at most the budget
    error(layer, pattern) = relative error of the network's outputs with this layer alone at the pattern

The error of a layer's own outputs would not do: a few large features hide all others, and attention scores may change a
lot for nothing. Errors are measured on the dense network, and are taken to add up. From all layers dense, the step that
adds the least error for what it saves is taken until the budget is met: steps along the lower convex hull of each
layer's (cost, error), which is exact but for the last one.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openwork.inference.deploy import plan
from openwork.nm.groups import reduction_size
from openwork.nm.pattern import Pattern
from openwork.pruning.inputs import Inputs
from openwork.pruning.layer import prune_weight
from openwork.pruning.prune import candidates_for, device_batches, plain_products
from openwork.pruning.solver import Solver
from openwork.pruning.sparsegpt import SparseGPT
from openwork.pruning.stages import stages
from openwork.training.parametrize import unwrap
from openwork.training.select import Candidate
from openwork.training.selection import AxisChoice, Selection
from openwork.training.sparsify import check_plain, project
from openwork.utils.example import cloned, quiet, run
from openwork.utils.progress import Progress
from openwork.utils.table import aligned
from openwork.utils.torch_private import tree_leaves

Of = Literal["time", "macs", "bytes"]


@dataclass(frozen=True)
class Choice:
    """One way to have a layer: its pattern, None for dense; what it costs; the relative error of the network's outputs
    that it makes."""

    pattern: Pattern | None
    cost: float
    error: float


class Allocation(dict[str, Pattern]):
    """Weight -> pattern, as `sparsify` and `prune` take it; what is not in it stays dense. `str()` is a table.

    `cost`: of the chosen patterns, as a share of all dense; `choices`: what there was to choose from, by weight.

    >>> import torch, openwork as ow
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    >>> found = ow.allocate(model, [torch.randn(64, 16)], budget=0.5, of="bytes")
    >>> found.cost <= 0.5, found.error > 0
    (True, True)
    """

    def __init__(self, chosen: Mapping[str, Choice], choices: Mapping[str, Sequence[Choice]], of: str):
        super().__init__({name: choice.pattern for name, choice in chosen.items() if choice.pattern})
        self.chosen, self.choices, self.of = dict(chosen), dict(choices), of

    @property
    def cost(self) -> float:
        return _cost(self.chosen) / _dense_cost(self.choices)

    @property
    def error(self) -> float:
        """The sum of the errors that the layers make."""
        return sum(choice.error for choice in self.chosen.values())

    def __str__(self) -> str:
        lines = [
            [
                name,
                str(choice.pattern or "dense"),
                f"{choice.cost / self.choices[name][0].cost:.3f}",
                f"{choice.error:.4f}",
            ]
            for name, choice in self.chosen.items()
        ]
        end = f"{self.of}: {self.cost:.3f} of dense; sum of errors {self.error:.4f}"
        return "\n".join([*aligned(["weight", "pattern", self.of, "error"], lines), end])


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float = 0.5,
    of: Of = "time",
    patterns: Sequence[str | Pattern] = ("2:4", "1:4", "1:8", "1:16"),
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    solver: Solver = SparseGPT(),
    scored: int = 4,
    example: Any = None,
    progress: bool | None = None,
) -> Allocation:
    """The pattern of each layer, or none, that loses the least at a cost: `budget` times what the weights that can be
    sparse cost dense.

    `of`: "time", that of each layer on this machine, as `ow.plan` measures it for `example` (by default the first
    batch), which must be the input that the network will run on; "macs", multiply-adds of the example; "bytes", values
    and indices. `patterns`: those to choose from. `batches`, `exclude` and `axis` are those of `prune`, whose `solver`
    prunes each layer by itself. What that does to the network's outputs is measured on `scored` of the batches, evenly
    spaced: as many forward passes for each layer and pattern. The model is not changed. Raises ValueError where the
    budget cannot be met.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> found = allocate(model, [torch.randn(256, 16)], budget=0.5, of="macs")
    >>> found.cost <= 0.5 and set(found) <= {"0.weight", "2.weight"}
    True
    """
    if of not in get_args(Of):
        raise ValueError(f"of={of!r}; needed one of {', '.join(map(repr, get_args(Of)))}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r}; needed a share of the dense cost, above 0 and at most 1")
    parsed = sorted({Pattern.parse(each) for each in patterns}, key=lambda each: -each.density)
    if not parsed:
        raise ValueError("patterns is empty; needed at least one, such as '2:4'")
    model = unwrap(model)
    check_plain(model)
    given = device_batches(batches, model)
    example = given[0] if example is None else example
    with torch.inference_mode(False), plain_products(model):
        sparse, macs = _fitting(model, parsed, exclude, axis, example)
        errors = _errors(model, sparse, given, _spaced(given, scored), solver, progress)
    costs = _times(model, sparse, example, axis) if of == "time" else _sizes(sparse, macs if of == "macs" else None)
    choices = {
        name: [Choice(None, dense, 0.0)]
        + [Choice(each, costs[name][each], error) for each, error in errors[name].items() if each in costs[name]]
        for name, dense in ((name, costs[name][None]) for name in errors)
        if dense > 0
    }
    return Allocation(choose(choices, budget), choices, of)


def choose(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """One choice for each layer, the first of which is dense, at `budget` times the dense cost or less."""
    chosen = {name: each[0] for name, each in choices.items()}
    allowed = budget * _dense_cost(choices)
    while _cost(chosen) > allowed * (1 + 1e-9):
        steps = [
            ((choice.error - now.error) / (now.cost - choice.cost), name, choice)
            for name, now in chosen.items()
            for choice in choices[name]
            if choice.cost < now.cost
        ]
        if not steps:
            least = _cost(chosen) / _dense_cost(choices)
            raise ValueError(
                f"budget={budget} cannot be met: with every layer at its cheapest pattern {least:.3f} of the dense "
                "cost is left; add sparser patterns"
            )
        _, name, choice = min(steps, key=lambda step: (step[0], step[1]))
        chosen[name] = choice
    return _spent(choices, chosen, allowed)


def _spent(choices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], allowed: float) -> dict[str, Choice]:
    """What the last step saved too much goes back to the layers that gain most of it."""
    while True:
        left = allowed - _cost(chosen)
        steps = [
            (now.error - choice.error, name, choice)
            for name, now in chosen.items()
            for choice in choices[name]
            if choice.error < now.error and choice.cost - now.cost <= left
        ]
        if not steps:
            return chosen
        _, name, choice = max(steps, key=lambda step: (step[0], step[1]))
        chosen = {**chosen, name: choice}


def _dense_cost(choices: Mapping[str, Sequence[Choice]]) -> float:
    return math.fsum(each[0].cost for each in choices.values())


def _cost(chosen: Mapping[str, Choice]) -> float:
    return math.fsum(choice.cost for choice in chosen.values())


def _errors(
    model: nn.Module,
    candidates: Mapping[Pattern, Mapping[str, Candidate]],
    batches: list[Any],
    scored: Sequence[Any],
    solver: Solver,
    progress: bool | None,
) -> dict[str, dict[Pattern, float]]:
    """What each weight at each pattern that fits it does to the network's outputs on the `scored` batches."""
    every = {name: each for of_one in candidates.values() for name, each in of_one.items()}
    errors: dict[str, dict[Pattern, float]] = {}
    bar, expected = Progress(len(every), progress), _outputs(model, scored)
    for stage in stages(model, every, batches):
        inputs = Inputs({name: every[name] for name in stage.names}, solver.needs_gram)
        stage.watch(inputs.visit)
        for name in stage.names:
            errors[name] = {}
            for pattern in (each for each in candidates if name in candidates[each]):
                with _restored(every[name].weight.detach()):
                    prune_weight(candidates[pattern][name], inputs.parts[name].values(), solver)
                    errors[name][pattern] = _difference(_outputs(model, scored), expected)
            inputs.parts.pop(name)
            bar.advance(name)
    bar.end()
    return errors


def _spaced(batches: list[Any], count: int) -> list[Any]:
    return batches[:: max(1, len(batches) // max(1, count))][: max(1, count)]


@contextlib.contextmanager
def _restored(weight: Tensor) -> Iterator[None]:
    dense = weight.clone()
    try:
        yield
    finally:
        weight.copy_(dense)


def _outputs(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """The real numbers that the model returns for the batches."""
    with quiet(model):
        found = tree_leaves([run(model, cloned(batch)) for batch in batches])
    real = [torch.view_as_real(each) if each.is_complex() else each for each in found if isinstance(each, Tensor)]
    return [each.float() for each in real if each.is_floating_point()]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The squared difference over the squares, of numbers that are finite: scores may be masked by infinity. Raises
    ValueError where there is nothing to compare."""
    squares = changes = 0.0
    alike = len(found) == len(expected) and all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
    for a, b in zip(found, expected, strict=True) if alike else ():
        finite = a.isfinite() & b.isfinite()
        squares += float(b.where(finite, 0).square().sum(dtype=torch.float64))
        changes += float((a - b).where(finite, 0).square().sum(dtype=torch.float64))
    if not squares:
        what = "are no real numbers, or zeros alone" if alike else "have other shapes once a layer is pruned"
        raise ValueError(
            f"what a layer does to the network cannot be measured: its outputs {what}; give a module around it that "
            "returns what to compare, such as its logits or features"
        )
    return changes / squares


def _fitting(
    model: nn.Module, patterns: Sequence[Pattern], exclude: Sequence[str], axis: AxisChoice, example: Any
) -> tuple[dict[Pattern, dict[str, Candidate]], Mapping[str, int]]:
    """The weights that each pattern fits, and multiply-adds by weight; raises ValueError where none fits any."""
    found: dict[Pattern, dict[str, Candidate]] = {}
    macs: dict[str, int] = {}
    for pattern in patterns:
        try:
            tried = candidates_for(model, Selection(str(pattern), exclude=exclude, axis=axis), example)
        except ValueError:  # no weight can be sparse
            if pattern == patterns[-1] and not found:
                raise
            continue
        found[pattern] = {each.name: each for each in tried.decided if each.pattern}
        macs |= tried.macs or {}
    return found, macs


def _sizes(
    candidates: Mapping[Pattern, Mapping[str, Candidate]], macs: Mapping[str, int] | None
) -> dict[str, dict[Pattern | None, float]]:
    """What each weight costs dense (None) and at each pattern: multiply-adds, or bits where `macs` is None."""
    costs: dict[str, dict[Pattern | None, float]] = {}
    for pattern, of_one in candidates.items():
        for name, each in of_one.items():
            numbers, indices = each.weight.numel() * 8 * each.weight.element_size(), 0
            if macs is not None:
                numbers = macs[name]
            else:
                K = reduction_size(tuple(each.weight.shape), each.axis)
                indices = each.weight.numel() // K * math.ceil(K / pattern.m) * pattern.index_bits
            costs.setdefault(name, {None: numbers})[pattern] = numbers * pattern.density + indices
    return costs


def _times(
    model: nn.Module, candidates: Mapping[Pattern, Mapping[str, Candidate]], example: Any, axis: AxisChoice
) -> dict[str, dict[Pattern | None, float]]:
    """Seconds, as `plan` measures them, each pattern on a copy of the model whose weights have it; the dense time is
    the mean of those that were measured beside."""
    dense: dict[str, list[float]] = {}
    costs: dict[str, dict[Pattern | None, float]] = {}
    for pattern, of_one in candidates.items():
        pruned = copy.deepcopy(model)
        selection = Selection({glob.escape(name): pattern for name in of_one}, axis=axis)
        project(pruned, selection)
        for timing in plan(pruned, example, pattern=selection).layers:
            if timing.name in of_one:
                dense.setdefault(timing.name, []).append(timing.dense)
                costs.setdefault(timing.name, {})[pattern] = timing.sparse if timing.kind else timing.dense
    return {name: {None: sum(times) / len(times), **costs[name]} for name, times in dense.items()}
