"""Which weights can be sparse, along which axis, and why the others are left alone.

A candidate is every floating-point parameter with two or more dims. What a weight's reduction axis is follows from the
module that owns it; a parameter of an unknown module needs `axis={glob: dim}`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from openwork.axis import Axis, reduction_size
from openwork.pattern import Pattern

AxisChoice = Literal["input", "kernel"] | Mapping[str, int]
PatternChoice = str | Pattern | Mapping[str, str | Pattern]
Remainder = Literal["skip", "pad", "error"]


@dataclass(frozen=True)
class Candidate:
    """One weight and what was decided for it: `pattern` and `axis`, or the `reason` why not."""

    module_name: str
    module: nn.Module
    tensor: str
    weight: nn.Parameter
    axis: Axis | None = None
    pattern: Pattern | None = None
    reason: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and those of the modules it is tied to."""
        return (self.name, *self.aliases)

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.tensor}".lstrip(".")


def decide(
    model: nn.Module,
    pattern: PatternChoice,
    *,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    remainder: Remainder = "skip",
) -> list[Candidate]:
    """Every candidate of `model` with its decision. Raises ValueError where a glob matches nothing, where `remainder`
    is "error" and M does not divide an axis, or where nothing is left to be sparse."""
    if remainder not in ("skip", "pad", "error"):
        raise ValueError(f"remainder={remainder!r}; needed 'skip', 'pad' or 'error'")
    if isinstance(exclude, str):
        raise TypeError(f"exclude={exclude!r} is one string; needed a list of globs, such as [{exclude!r}]")
    found = _found(model)
    patterns = {key: Pattern.parse(value) for key, value in pattern.items()} if isinstance(pattern, Mapping) else None
    rules = _Rules(patterns or {"*": Pattern.parse(pattern)}, tuple(exclude), axis, remainder)
    rules.check_globs(found)
    decided = [rules.decide(each) for each in found]
    if not any(each.pattern for each in decided):
        listed = "\n".join(f"  {each.name}: {each.reason}" for each in decided) or "  it has no parameter of two dims or more"
        raise ValueError(f"{type(model).__name__} has no weight that can be sparse:\n{listed}")
    return decided


def matches(glob: str, name: str) -> bool:
    """Whether a glob names the weight, its module, or any module around it.

    >>> matches("layer4", "layer4.0.conv1.weight"), matches("*.conv1", "layer4.0.conv1.weight"), matches("fc", "fc2.weight")
    (True, True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1))


@dataclass(frozen=True)
class _Rules:
    patterns: Mapping[str, Pattern]
    exclude: tuple[str, ...]
    axis: AxisChoice
    remainder: Remainder

    def check_globs(self, found: list[Candidate]) -> None:
        names = [name for each in found for name in each.names]
        _demand_matches("exclude", self.exclude, names)
        if self.axis not in ("input", "kernel"):
            if not isinstance(self.axis, Mapping):
                raise ValueError(f"axis={self.axis!r}; needed 'input', 'kernel' or a mapping from globs to dims")
            _demand_matches("axis", self.axis, names)
        chosen = {self._glob(name) for name in names}
        for glob in self.patterns:
            _demand_matches("pattern", [glob], names) if names else None
            if names and glob not in chosen:
                raise ValueError(f"pattern glob {glob!r} decides nothing: globs before it match all its weights; move it up")

    def decide(self, found: Candidate) -> Candidate:
        axis, reason = self._axis(found)
        glob = self._glob(found.name)
        excluded = next((glob for glob in self.exclude for name in found.names if matches(glob, name)), None)
        if excluded is not None:
            reason = f"excluded by {excluded!r}"
        elif glob is None:
            reason = "no pattern given for it"
        if reason:
            return _with(found, axis, None, reason)
        return self._divided(found, axis, self.patterns[glob])

    def _divided(self, found: Candidate, axis: Axis, pattern: Pattern) -> Candidate:
        K = reduction_size(tuple(found.weight.shape), axis)
        if K % pattern.m == 0 or (self.remainder == "pad" and K > 1):
            return _with(found, axis, pattern, "")
        what = f"reduction axis has {K} weights, not a multiple of {pattern.m}"
        if self.remainder == "error":
            raise ValueError(f"{found.name} {tuple(found.weight.shape)}: {what}; exclude it, or use remainder='skip' or 'pad'")
        return _with(found, axis, None, what)

    def _glob(self, name: str) -> str | None:
        return next((glob for glob in self.patterns if matches(glob, name)), None)

    def _axis(self, found: Candidate) -> tuple[Axis | None, str]:
        if found.aliases:
            return None, f"tied to {', '.join(found.aliases)}"
        if parametrize.is_parametrized(found.module) or found.tensor.startswith("parametrizations."):
            return None, "its module is already parametrized"
        if isinstance(self.axis, Mapping):
            for glob, dim in self.axis.items():
                if matches(glob, found.name):
                    return _named_axis(found, dim), ""
        axis, reason = known_axis(found.module, found.tensor)
        return (Axis(flat=True), "") if axis and self.axis == "kernel" else (axis, reason)


def known_axis(module: nn.Module, tensor: str) -> tuple[Axis | None, str]:
    """The reduction axis of a module's weight, or None and the reason why it has none."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, "embedding: rows are looked up, not multiplied"
    if tensor == "weight" and isinstance(module, nn.Linear):
        return Axis(1), ""
    if tensor == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return _conv_axis(module)
    if isinstance(module, nn.MultiheadAttention) and tensor.endswith("proj_weight"):
        return Axis(1), ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and tensor.startswith("weight"):
        return Axis(1), ""
    if tensor == "weight" and _is_hf_conv1d(module):
        return Axis(0), ""
    return None, f"no known reduction axis in {type(module).__name__}: name it with axis={{glob: dim}}"


def _conv_axis(module: nn.modules.conv._ConvNd) -> tuple[Axis | None, str]:
    if module.groups > 1 and module.in_channels == module.groups:
        return None, "depthwise: each output has one input channel"
    return (Axis(0, blocks=module.groups) if module.transposed else Axis(1)), ""


def _is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D is a linear layer with a transposed weight (in, out). It is not imported to find out."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def _found(model: nn.Module) -> list[Candidate]:
    """Every candidate once, under its first name; the others are its aliases."""
    found: dict[int, Candidate] = {}
    for module_name, module in model.named_modules():
        if type(module) is parametrize.ParametrizationList:
            continue
        for tensor, weight in _own_parameters(module):
            new = Candidate(module_name, module, tensor, weight)
            _demand_initialized(new)
            first = found.get(id(weight))
            if first is not None:
                found[id(weight)] = dataclasses.replace(first, aliases=(*first.aliases, new.name))
            elif weight.is_floating_point() and weight.ndim >= 2 and weight.numel():
                found[id(weight)] = new
    return list(found.values())


def _demand_initialized(found: Candidate) -> None:
    if isinstance(found.weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{found.name} is not initialized yet: run one forward before sparsify")


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((name, each) for name, each in module._parameters.items() if each is not None)
    for name, each in (module._modules.get("parametrizations") or nn.ModuleDict()).items():
        yield from ((f"{name}.{inner}", weight) for inner, weight in each._parameters.items())


def _with(found: Candidate, axis: Axis | None, pattern: Pattern | None, reason: str) -> Candidate:
    return dataclasses.replace(found, axis=axis, pattern=pattern, reason=reason)


def _named_axis(found: Candidate, dim: int) -> Axis:
    ndim = found.weight.ndim
    if not -ndim <= dim < ndim:
        raise ValueError(f"axis: {found.name} has {ndim} dims {tuple(found.weight.shape)}, found dim {dim}")
    return Axis(dim % ndim)


def _demand_matches(argument: str, globs: Iterable[str], names: list[str]) -> None:
    for glob in globs:
        if not any(matches(glob, name) for name in names):
            close = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ValueError(f"{argument} glob {glob!r} matches no weight of two dims or more{hint}")
