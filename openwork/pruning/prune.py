"""Prune a trained network once, layer by layer, from calibration batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.nm.masks import too_dense
from openwork.pruning.alps import ALPS
from openwork.pruning.inputs import Inputs, NotFinite
from openwork.pruning.layer import prune_weight
from openwork.pruning.refit import Refit
from openwork.pruning.report import PrunedWeight, PruneReport
from openwork.pruning.saved import Saved
from openwork.pruning.solver import Solver
from openwork.pruning.stages import Stage, stages
from openwork.training.matmul_trace import without_fast_path, without_onednn
from openwork.training.parametrize import unwrap
from openwork.training.report import Report
from openwork.training.select import Candidate, check_has_values, check_some_sparse, decide
from openwork.training.selection import AxisChoice, PatternChoice, Remainder, Selection
from openwork.training.sparsify import check_plain, magnitude_mask, report_on, selection_of
from openwork.training.try_masks import Tried, try_masks
from openwork.utils.counted import counted
from openwork.utils.example import cloned, mapped
from openwork.utils.progress import Progress

_SETTINGS = (("use_cache", True, False), ("_experts_implementation", "batched_mm", "eager"))
"""Of transformers' configurations, as found and as needed: no cache, and experts that multiply their own tokens."""

_NORMALIZED = "a part of a normalized weight: fold it, by torch.nn.utils.parametrize.remove_parametrizations"

_EXPANDED = "its numbers share memory: clone it"


def prune(
    model: nn.Module,
    pattern: Selection | PatternChoice,
    batches: Iterable[Any],
    *,
    solver: Solver = ALPS(),
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    remainder: Remainder = "skip",
    masks: Mapping[str, Tensor] | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> PruneReport:
    """Make a trained model N:M, in place, and return what it cost. The weights that are kept make up for those that are
    not, so that each layer's outputs on the calibration batches change as little as the solver can manage.

    `batches`: inputs of the model, each a tensor, a tuple of arguments or a mapping of keyword arguments; what they
    contain is what the network will still be good at, and padding counts as input. `pattern`, `exclude`, `axis` and
    `remainder` are those of `sparsify`. `masks`: those to keep, by weight, such as `ow.masks` of a network that was
    trained sparse from this one; `solver` is then `ow.Refit()`, which finds the weights for them. `resume`: a folder
    that keeps each weight once it is pruned; the same call on the same dense network goes on from there. `progress`: a
    line on stderr, by default where that is a terminal.

    Blocks are pruned one after the other, each on inputs from the pruned ones before it. One block's inputs and Gram
    matrices, in double precision, are held at a time, beside the batches themselves. A matrix that too few samples
    reach, such as a rare expert's, is pruned by the score of Wanda or by magnitude, and the report says so. Raises
    ValueError where there is no batch, where inputs are not finite, and as `sparsify` does.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> report = prune(model, "2:4", [torch.randn(64, 8)])
    >>> list(report.errors), int((model[2].weight != 0).sum())
    (['0.weight', '2.weight'], 32)
    """
    start = time.perf_counter()
    model = unwrap(model)
    check_plain(model)
    if not isinstance(solver, Solver):
        raise TypeError(f"solver={solver!r}; needed a solver object such as ow.ALPS() or ow.SparseGPT()")
    given = device_batches(batches, model)
    selection = selection_of(pattern, exclude, axis, remainder)
    if selection.axis == "kernel":
        raise ValueError("axis='kernel' groups weights that no product sums over together; needed axis='input'")
    with plain_products(model), torch.inference_mode(False):
        tried = candidates_for(model, selection, given[0])
        candidates = {each.name: each for each in tried.decided if each.pattern}
        known = _check_masks(masks, candidates, solver)
        saved = None if resume is None else Saved(Path(resume), solver, model, candidates, [*given, known])
        bar = Progress(len(candidates), progress)
        found: dict[str, PrunedWeight] = {}
        with _said_how_far(found, len(candidates)):
            for stage in stages(model, candidates, given):
                for result in _prune_stage(stage, candidates, solver, saved, known):
                    found[result.name] = result
                    bar.advance(f"{result.name}  error {result.error:.4f}")
        bar.end()
    report = _report(model, tried, found, f"{type(model).__name__}, pruned by {solver}")
    layers = tuple(found[name] for name in candidates)
    return PruneReport(layers, report, repr(solver), time.perf_counter() - start)


def candidates_for(model: nn.Module, selection: Selection, batch: Any) -> Tried:
    """Which weights are to be pruned: those whose zeros would be in the products of a batch."""
    decided = decide(model, selection, example=cloned(batch))
    check_has_values(decided)
    decided = [replace(each, pattern=None, reason=_NORMALIZED) if each.factor else each for each in decided]
    decided = [replace(each, pattern=None, reason=_EXPANDED) if _is_expanded(each.weight) else each for each in decided]
    check_some_sparse(model, decided)
    for each in decided:
        if each.pattern and not each.weight.detach().isfinite().all():
            raise ValueError(f"{each.name} holds NaN or infinity: load a finite network, or exclude it")
    masks = {each.name: lambda _, each=each: magnitude_mask(each) for each in decided if each.pattern}
    try:
        return try_masks(model, cloned(batch), decided, masks, tuple(selection.exclude))
    except TypeError as error:
        raise TypeError(
            f"the model cannot be called with a batch of type {type(batch).__name__}: {error}. A batch is the input "
            "alone, a tensor, a tuple of arguments or a mapping of keyword arguments; of a loader that gives labels "
            "too: (x for x, y in loader)"
        ) from error


def _is_expanded(weight: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True))


def _prune_stage(
    stage: Stage,
    candidates: Mapping[str, Candidate],
    solver: Solver,
    saved: Saved | None,
    masks: Mapping[str, Tensor],
) -> Iterator[PrunedWeight]:
    """Prune the weights of a stage, or fill in what was saved of them: not before all inputs are seen."""
    stored = {name: found for name in stage.names if saved and (found := saved.load(candidates[name]))}
    mine = {name: candidates[name] for name in stage.names if name not in stored}
    inputs = Inputs(mine, solver.needs_gram)
    try:
        if mine:
            stage.watch(inputs.visit)
    except NotFinite as error:
        raise ValueError(f"{error}: see which batch or which layer before it overflows") from None
    for name, (weight, result) in stored.items():
        candidates[name].weight.detach().copy_(weight)
        yield result
    for name, candidate in mine.items():
        parts, unseen = inputs.parts[name].values(), inputs.unseen.get(name, "")
        result = prune_weight(candidate, parts, solver, unseen, masks.get(name))
        inputs.parts.pop(name)  # its Gram matrix is not needed any more
        if saved:
            saved.save(candidate, result)
        yield result


@contextlib.contextmanager
def _said_how_far(found: Mapping[str, Any], count: int) -> Iterator[None]:
    """What ends a run says how much of the model is changed."""
    try:
        yield
    except BaseException as error:
        pruned = f"{len(found)} of {counted(count, 'weight')} {'is' if len(found) == 1 else 'are'} pruned already"
        told = f"{pruned}: start again from the dense network"
        if found and isinstance(error, ValueError) and error.args:
            error.args = (f"{error.args[0]}; {told}", *error.args[1:])
        elif found and hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(told)
        raise


def _check_masks(
    masks: Mapping[str, Tensor] | None, candidates: Mapping[str, Candidate], solver: Solver
) -> dict[str, Tensor]:
    """The masks that were given, of each weight; raises ValueError where they are not those of the weights."""
    if masks is None:
        return {}
    if not isinstance(solver, Refit):
        raise ValueError(f"masks= with {solver}, which chooses its own; needed solver=ow.Refit()")
    known = {}
    for name, candidate in candidates.items():
        assert candidate.pattern
        if name not in masks:
            raise ValueError(f"masks has none of {name}: exclude the weight, or give its mask")
        known[name] = mask = masks[name].to(candidate.weight.device, torch.bool)
        if mask.shape != candidate.weight.shape:
            raise ValueError(f"masks[{name!r}]: found {tuple(mask.shape)}, needed {tuple(candidate.weight.shape)}")
        if problem := too_dense(mask, candidate.pattern, candidate.axis):
            raise ValueError(f"masks[{name!r}]: {problem}")
    return known


def _report(model: nn.Module, tried: Tried, found: Mapping[str, PrunedWeight], title: str) -> Report:
    report = report_on(model, tried.decided, lambda _, weight: weight != 0, tried.macs, title)
    rows = [replace(row, retained=found[row.name].retained) if row.name in found else row for row in report.rows]
    return replace(report, rows=tuple(rows), notes=tried.notes)


def _device(model: nn.Module) -> torch.device:
    devices = sorted({tensor.device for tensor in model.parameters()}, key=str)
    if len(devices) > 1:
        raise ValueError(f"the model is on {', '.join(map(str, devices))}; needed one device: move it to one first")
    return devices[0] if devices else torch.device("cpu")


def device_batches(batches: Iterable[Any], model: nn.Module) -> list[Any]:
    """All batches, on the device of the model; raises ValueError where there is none of either."""
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(
            f"batches is one {type(batches).__name__}; needed an iterable of batches, such as a list of one: [batch]"
        )
    device, given = _device(model), list(batches)
    if not given:
        raise ValueError("batches has no batch; needed at least one input of the model to calibrate with")
    return [mapped(batch, lambda tensor: tensor.to(device)) for batch in given]


@contextlib.contextmanager
def plain_products(model: nn.Module) -> Iterator[None]:
    """Layers multiply in operators whose inputs can be seen, not in fused ones, and keep nothing for a next call."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    with contextlib.ExitStack() as plain:
        plain.enter_context(without_fast_path())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            plain.enter_context(without_onednn())
            plain.enter_context(torch.backends.cudnn.flags(enabled=False))
        for name, found, needed in _SETTINGS:
            for config in {id(each): each for each in configs if getattr(each, name, None) == found}.values():
                setattr(config, name, needed)
                plain.callback(setattr, config, name, found)
        yield
