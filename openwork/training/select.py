"""Which weights can be sparse, along which axis, and why the others are left alone.

A candidate is every parameter of two or more dims that holds real or complex numbers, or bytes, as quantized weights
do: what of them cannot be sparse is told with its reason. What a weight's reduction axis is follows from the module
that owns it. Of a parameter of an unknown module it is that which the products of an example sum over; without one it
needs `axis={glob: dim}`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from openwork.nm.groups import Axis, reduction_size
from openwork.nm.pattern import Pattern
from openwork.training.known_layers import UNKNOWN, known_axis, known_output_axis
from openwork.training.parametrize import plain_name
from openwork.training.seen_axes import seen_axes
from openwork.training.selection import Selection, matches
from openwork.training.weight_norm import LENGTHS, Factor, factors
from openwork.utils.counted import counted
from openwork.utils.deployed import check_not_deployed
from openwork.utils.names import join
from openwork.utils.torch_private import is_traceable_wrapper_subclass

TRAINED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # float8 has no arithmetic
HELD = (*TRAINED, torch.int8)
"""What may be stored and verified as N:M."""


@dataclass(frozen=True)
class Candidate:
    """One weight and what was decided for it: `pattern` and `axis`, or the `reason` why not. `output_axis` is the
    one along which it is N:M as well, where masks are to be transposable.

    `aliases` are the further names of the weight. Where they are names of one module that has several, the weight can
    be sparse; where other modules hold it (`tied`), it is left alone. `factor`: what it is of a normalized weight.
    `seen`: its axis is that of the products of an example.
    """

    module_name: str
    module: nn.Module
    tensor_name: str
    weight: nn.Parameter
    pattern: Pattern | None = None
    axis: Axis = field(default_factory=Axis)
    output_axis: Axis | None = None
    reason: str = ""
    aliases: tuple[str, ...] = ()
    tied: bool = False
    factor: Factor | None = None
    seen: bool = False

    @property
    def product(self) -> tuple[nn.Module, str]:
        """The layer that multiplies with it, and its name there."""
        return (self.factor.layer, self.factor.weight) if self.factor else (self.module, self.tensor_name)

    @property
    def name(self) -> str:
        return join(self.module_name, self.tensor_name)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a glob may name it by; of a weight that is normalized its plain name as well."""
        plain: tuple[str, ...] = ()
        if self.factor:
            layer = self.module_name.removesuffix(f"parametrizations.{self.factor.weight}").removesuffix(".")
            plain = (join(layer, self.factor.weight),)
        return (self.name, *self.aliases, *plain)


def decide(
    model: nn.Module, selection: Selection, *, dtypes: Sequence[torch.dtype] = TRAINED, example: Any = None
) -> list[Candidate]:
    """Every candidate of `model` with its decision; those of other `dtypes` are left alone. With an `example`, the axes
    that the modules do not tell are those that its products sum over.

    Raises ValueError where a glob matches nothing, where `remainder` is "error" and M does not divide an axis, or where
    nothing is left to be sparse."""
    check_not_deployed(model, "finding the weights that can be sparse")
    candidates = _candidates(model)
    if dtypes == HELD:
        check_has_values(candidates)
    rules = _Rules(selection, tuple(dtypes))
    if candidates:
        buffers = [plain_name(name) for name, buffer in model.named_buffers() if buffer.ndim >= 2]
        rules.check_globs([candidate.names for candidate in candidates], buffers)
    decided = [rules.decide(candidate) for candidate in candidates]
    unknown = {each.name: each.weight for each in decided if each.reason.startswith(UNKNOWN)}
    if example is not None and unknown:
        rules = dataclasses.replace(rules, seen=seen_axes(model, example, unknown))
        decided = [dataclasses.replace(rules.decide(each), seen=each.name in unknown) for each in candidates]
    check_some_sparse(model, decided)
    return decided


def check_some_sparse(model: nn.Module, decided: list[Candidate]) -> None:
    """Raises ValueError, with the reasons, where no weight is to be sparse."""
    if not any(candidate.pattern for candidate in decided):
        listed = [f"  {candidate.name}: {candidate.reason}" for candidate in decided]
        listed = listed or ["  it has no parameter of two dims or more"]
        raise ValueError("\n".join([f"{type(model).__name__} has no weight that can be sparse:", *listed]))


def check_has_values(candidates: Sequence[Candidate]) -> None:
    """Raises ValueError where a weight is on the meta device, where tensors hold nothing."""
    for candidate in candidates:
        if candidate.weight.is_meta:
            raise ValueError(
                f"{candidate.name} is on the meta device, where it has no values: load or initialize the model first"
            )


@dataclass(frozen=True)
class _Rules:
    selection: Selection
    dtypes: tuple[torch.dtype, ...]
    seen: Mapping[str, Axis | str] = field(default_factory=dict)

    def check_globs(self, names_of_each: list[tuple[str, ...]], buffers: list[str]) -> None:
        """`exclude` may name buffers, so that `verify` lets them be multiplied."""
        names = [name for aliases in names_of_each for name in aliases]
        _check_matches("exclude", self.selection.exclude, names + buffers)
        _check_matches("axis", self.selection.axis if isinstance(self.selection.axis, Mapping) else (), names)
        _check_matches("pattern", self.selection.patterns, names)
        deciding = {self._pattern_glob(aliases) for aliases in names_of_each}
        for glob in self.selection.patterns:
            if glob not in deciding:
                raise ValueError(
                    f"pattern glob {glob!r} decides nothing: globs before it match all it names; move it up"
                )

    def decide(self, candidate: Candidate) -> Candidate:
        excluded = next((glob for glob in self.selection.exclude if _any_matches(glob, candidate.names)), None)
        if excluded is not None:
            return dataclasses.replace(candidate, reason=f"excluded by {excluded!r}")
        axis, reason = self._axis(candidate)
        if axis is None:
            return dataclasses.replace(candidate, reason=reason)
        glob = self._pattern_glob(candidate.names)
        if glob is None:
            return dataclasses.replace(candidate, reason="no pattern given for it")
        return self._divided(candidate, axis, self.selection.patterns[glob])

    def _divided(self, candidate: Candidate, axis: Axis, pattern: Pattern) -> Candidate:
        shape = tuple(candidate.weight.shape)
        output_axis, reason = None, ""
        if self.selection.transposable:
            output_axis, reason = known_output_axis(candidate.product[0], len(shape), axis)
        if reason:
            return dataclasses.replace(candidate, reason=reason)
        lengths = {"reduction": reduction_size(shape, axis)} | (
            {"output": reduction_size(shape, output_axis)} if output_axis else {}
        )
        whole = all(length % pattern.m == 0 for length in lengths.values())
        if whole or (self.selection.remainder == "pad" and min(lengths.values()) > 1):
            return dataclasses.replace(candidate, pattern=pattern, axis=axis, output_axis=output_axis)
        name, length = next(axis for axis in lengths.items() if axis[1] % pattern.m or axis[1] == 1)
        what = f"{name} axis has {counted(length, 'weight')}, not a multiple of {pattern.m}"
        if self.selection.remainder == "error":
            raise ValueError(f"{candidate.name} {shape}: {what}; exclude it, or use remainder='skip' or 'pad'")
        return dataclasses.replace(candidate, reason=what)

    def _pattern_glob(self, names: Sequence[str]) -> str | None:
        return next((glob for glob in self.selection.patterns if _any_matches(glob, names)), None)

    def _axis(self, candidate: Candidate) -> tuple[Axis | None, str]:
        if candidate.tied:
            return None, f"tied to {', '.join(candidate.aliases)}"
        if candidate.factor and not candidate.factor.direction:
            return None, f"{LENGTHS} of {candidate.factor.weight}: its mask lies on the direction"
        other = isinstance(candidate.module, parametrize.ParametrizationList) and not candidate.factor
        if other or parametrize.is_parametrized(candidate.module):
            return None, "its module is already parametrized"
        if reason := _unfit(candidate.weight, self.dtypes):
            return None, reason
        if isinstance(self.selection.axis, Mapping):
            for glob, dim in self.selection.axis.items():
                if _any_matches(glob, candidate.names):
                    return _named_axis(candidate, dim), ""
        axis, reason = known_axis(*candidate.product)
        seen = self.seen.get(candidate.name)
        if isinstance(seen, Axis):
            axis, reason = seen, ""
        elif seen:
            reason = f"{UNKNOWN} {type(candidate.product[0]).__name__}: {seen}"
        return (Axis(flat=True), "") if axis and self.selection.axis == "kernel" else (axis, reason)


def _candidates(model: nn.Module) -> list[Candidate]:
    """Every candidate once, under its first name; the others are its aliases."""
    candidates: dict[int, Candidate] = {}
    normalized = factors(model)
    for module_name, module in model.named_modules(remove_duplicate=False):
        for tensor_name, weight in module._parameters.items():
            if weight is None:
                continue
            factor = normalized.get((id(module), tensor_name))
            new = Candidate(plain_name(module_name), module, tensor_name, weight, factor=factor)
            _check_initialized(new)
            if id(weight) in candidates:
                candidates[id(weight)] = _also_named(candidates[id(weight)], new)
            elif weight.ndim >= 2 and not weight.is_nested and _holds_weights(weight):
                candidates[id(weight)] = new
    return list(candidates.values())


def _holds_weights(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype in (torch.int8, torch.uint8)


def _unfit(weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why the numbers of a weight cannot be masked; empty where they can."""
    if not weight.numel():
        return f"it holds no numbers: shape {tuple(weight.shape)}"
    if weight.layout != torch.strided:
        return f"layout {weight.layout}: needed an ordinary dense tensor"
    if weight.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"dtype {weight.dtype}: needed {', '.join(others)} or {last}"
    if dtypes == TRAINED and is_traceable_wrapper_subclass(weight):
        return f"it is a {type(weight).__name__}, whose numbers are not its own: needed an ordinary tensor"
    return ""


def _also_named(first: Candidate, new: Candidate) -> Candidate:
    same_place = new.module is first.module and new.tensor_name == first.tensor_name
    return dataclasses.replace(first, aliases=(*first.aliases, new.name), tied=first.tied or not same_place)


def _check_initialized(candidate: Candidate) -> None:
    if is_lazy(candidate.weight):
        raise ValueError(f"{candidate.name} is not initialized yet: run one forward before sparsify")


def _named_axis(candidate: Candidate, dim: int) -> Axis:
    ndim = candidate.weight.ndim
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"axis: {candidate.name} has {counted(ndim, 'dim')} {tuple(candidate.weight.shape)}, found dim {dim}"
        )
    return Axis(dim % ndim)


def _any_matches(glob: str, names: Iterable[str]) -> bool:
    return any(matches(glob, name) for name in names)


def _check_matches(argument: str, globs: Iterable[str], names: list[str]) -> None:
    for glob in globs:
        if not _any_matches(glob, names):
            close = difflib.get_close_matches(glob, _with_modules(names), n=3, cutoff=0.3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ValueError(f"{argument} glob {glob!r} matches no weight of two dims or more{hint}")


def _with_modules(names: list[str]) -> list[str]:
    """The names and those of the modules around them, each once."""
    return list(dict.fromkeys(name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)))
