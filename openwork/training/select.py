"""Which weights can be sparse, along which axis, and why the others are left alone.

A candidate is every floating-point parameter with two or more dims; to be stored or verified, one of int8 too. What a
weight's reduction axis is follows from the module that owns it; a parameter of an unknown module needs
`axis={glob: dim}`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from openwork.nm.groups import Axis, reduction_size
from openwork.nm.pattern import Pattern
from openwork.training.parametrize import plain_name
from openwork.utils.deployed import check_not_deployed

AxisChoice = Literal["input", "kernel"] | Mapping[str, int]
PatternChoice = str | Pattern | Mapping[str, str | Pattern]
Remainder = Literal["skip", "pad", "error"]

TRAINED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # float8 has no arithmetic
HELD = (*TRAINED, torch.int8)
"""What may be stored and verified as N:M."""


@dataclass(frozen=True)
class Candidate:
    """One weight and what was decided for it: `pattern` and `axis`, or the `reason` why not. `output_axis` is the
    one along which it is N:M as well, where masks are to be transposable.

    `aliases` are the further names of the weight. Where they are names of one module that has several, the weight can
    be sparse; where other modules hold it (`tied`), it is left alone.
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

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.tensor_name}".lstrip(".")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def decide(
    model: nn.Module,
    pattern: PatternChoice,
    *,
    exclude: Sequence[str] = (),
    axis: AxisChoice = "input",
    remainder: Remainder = "skip",
    dtypes: Sequence[torch.dtype] = TRAINED,
    transposable: bool = False,
) -> list[Candidate]:
    """Every candidate of `model` with its decision; those of other `dtypes` are left alone. `transposable`: M has to
    divide the output axis too.

    Raises ValueError where a glob matches nothing, where `remainder` is "error" and M does not divide an axis, or where
    nothing is left to be sparse."""
    check_not_deployed(model, "finding the weights that can be sparse")
    if remainder not in ("skip", "pad", "error"):
        raise ValueError(f"remainder={remainder!r}; needed 'skip', 'pad' or 'error'")
    if isinstance(exclude, str):
        raise TypeError(f"exclude={exclude!r} is one string; needed a list of globs, such as [{exclude!r}]")
    if axis not in ("input", "kernel") and not isinstance(axis, Mapping):
        raise ValueError(f"axis={axis!r}; needed 'input', 'kernel' or a mapping from globs to dims")
    found = _found(model, dtypes)
    patterns = pattern if isinstance(pattern, Mapping) else {"*": pattern}
    parsed = {glob: Pattern.parse(each) for glob, each in patterns.items()}
    rules = _Rules(parsed, tuple(exclude), axis, remainder, tuple(dtypes), transposable)
    if found:
        rules.check_globs([each.names for each in found])
    decided = [rules.decide(each) for each in found]
    if not any(each.pattern for each in decided):
        listed = [f"  {each.name}: {each.reason}" for each in decided] or ["  it has no parameter of two dims or more"]
        raise ValueError("\n".join([f"{type(model).__name__} has no weight that can be sparse:", *listed]))
    return decided


def matches(glob: str, name: str) -> bool:
    """Whether a glob names the weight, its module, or any module around it.

    >>> matches("layer4", "layer4.0.conv1.weight"), matches("*.conv1", "layer4.0.conv1.weight")
    (True, True)
    >>> matches("fc", "fc2.weight")
    False
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1))


@dataclass(frozen=True)
class _Rules:
    patterns: Mapping[str, Pattern]
    exclude: tuple[str, ...]
    axis: AxisChoice
    remainder: Remainder
    dtypes: tuple[torch.dtype, ...]
    transposable: bool

    def check_globs(self, found: list[tuple[str, ...]]) -> None:
        names = [name for each in found for name in each]
        _check_matches("exclude", self.exclude, names)
        _check_matches("axis", self.axis if isinstance(self.axis, Mapping) else (), names)
        _check_matches("pattern", self.patterns, names)
        deciding = {self._pattern_glob(each) for each in found}
        for glob in self.patterns:
            if glob not in deciding:
                raise ValueError(
                    f"pattern glob {glob!r} decides nothing: globs before it match all it names; move it up"
                )

    def decide(self, found: Candidate) -> Candidate:
        excluded = next((glob for glob in self.exclude if _any_matches(glob, found.names)), None)
        if excluded is not None:
            return dataclasses.replace(found, reason=f"excluded by {excluded!r}")
        axis, reason = self._axis(found)
        if axis is None:
            return dataclasses.replace(found, reason=reason)
        glob = self._pattern_glob(found.names)
        if glob is None:
            return dataclasses.replace(found, reason="no pattern given for it")
        return self._divided(found, axis, self.patterns[glob])

    def _divided(self, found: Candidate, axis: Axis, pattern: Pattern) -> Candidate:
        shape = tuple(found.weight.shape)
        output_axis, reason = output_axis_of(found, axis) if self.transposable else (None, "")
        if reason:
            return dataclasses.replace(found, reason=reason)
        lengths = {"reduction": reduction_size(shape, axis)} | (
            {"output": reduction_size(shape, output_axis)} if output_axis else {}
        )
        whole = all(length % pattern.m == 0 for length in lengths.values())
        if whole or (self.remainder == "pad" and min(lengths.values()) > 1):
            return dataclasses.replace(found, pattern=pattern, axis=axis, output_axis=output_axis)
        name, length = next(each for each in lengths.items() if each[1] % pattern.m or each[1] == 1)
        what = f"{name} axis has {length} weights, not a multiple of {pattern.m}"
        if self.remainder == "error":
            raise ValueError(f"{found.name} {shape}: {what}; exclude it, or use remainder='skip' or 'pad'")
        return dataclasses.replace(found, reason=what)

    def _pattern_glob(self, names: Sequence[str]) -> str | None:
        return next((glob for glob in self.patterns if _any_matches(glob, names)), None)

    def _axis(self, found: Candidate) -> tuple[Axis | None, str]:
        if found.tied:
            return None, f"tied to {', '.join(found.aliases)}"
        if isinstance(found.module, parametrize.ParametrizationList) or parametrize.is_parametrized(found.module):
            return None, "its module is already parametrized"
        if found.weight.dtype not in self.dtypes:
            *others, last = (str(each).removeprefix("torch.") for each in self.dtypes)
            return None, f"dtype {found.weight.dtype}: needed {', '.join(others)} or {last}"
        if isinstance(self.axis, Mapping):
            for glob, dim in self.axis.items():
                if _any_matches(glob, found.names):
                    return _named_axis(found, dim), ""
        axis, reason = known_axis(found.module, found.tensor_name)
        return (Axis(flat=True), "") if axis and self.axis == "kernel" else (axis, reason)


def known_axis(module: nn.Module, tensor_name: str) -> tuple[Axis | None, str]:
    """The reduction axis of a module's weight, or None and the reason why it has none."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, "embedding: rows are looked up, not multiplied"
    if tensor_name == "weight" and isinstance(module, nn.Linear):
        return Axis(1), ""
    if tensor_name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return _conv_axis(module)
    if isinstance(module, nn.MultiheadAttention) and tensor_name.endswith("proj_weight"):
        return Axis(1), ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and tensor_name.startswith("weight"):
        return Axis(1), ""
    if tensor_name == "weight" and _is_hf_conv1d(module):
        return Axis(0), ""
    return None, f"no known reduction axis in {type(module).__name__}: name it with axis={{glob: dim}}"


def output_axis_of(found: Candidate, axis: Axis) -> tuple[Axis | None, str]:
    """The axis that the gradient of a layer's input sums over, or None and the reason why it is not known.

    Linear: the rows of the weight, dim 0. A convolution is a product for each position of its kernel, of outputs by
    inputs; the gradient sums over the outputs, dim 0, within each of its `groups`; in a transposed one that is dim 1.
    """
    if axis.flat:
        return None, "axis='kernel' groups the flattened weight, which has no output axis"
    module, ndim = found.module, found.weight.ndim
    if isinstance(module, nn.modules.conv._ConvNd) and axis == _conv_axis(module)[0]:
        return (Axis(1) if module.transposed else Axis(0, blocks=module.groups)), ""
    if axis.dim < ndim - 2:
        return None, f"no known output axis: its reduction axis is dim {axis.dim}, none of the last two"
    return Axis(2 * ndim - 3 - axis.dim), ""


def _conv_axis(module: nn.modules.conv._ConvNd) -> tuple[Axis | None, str]:
    if module.groups > 1 and module.in_channels == module.groups:
        return None, "depthwise: each output has one input channel"
    return (Axis(0, blocks=module.groups) if module.transposed else Axis(1)), ""


def _is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D is a linear layer with a transposed weight (in, out). It is not imported to find out."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def _found(model: nn.Module, dtypes: Sequence[torch.dtype]) -> list[Candidate]:
    """Every candidate once, under its first name; the others are its aliases."""
    found: dict[int, Candidate] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for tensor_name, weight in module._parameters.items():
            if weight is None:
                continue
            new = Candidate(plain_name(module_name), module, tensor_name, weight)
            _check_initialized(new)
            if id(weight) in found:
                found[id(weight)] = _also_named(found[id(weight)], new)
            elif (weight.is_floating_point() or weight.dtype in dtypes) and weight.ndim >= 2 and weight.numel():
                found[id(weight)] = new
    return list(found.values())


def _also_named(first: Candidate, new: Candidate) -> Candidate:
    same_place = new.module is first.module and new.tensor_name == first.tensor_name
    return dataclasses.replace(first, aliases=(*first.aliases, new.name), tied=first.tied or not same_place)


def _check_initialized(found: Candidate) -> None:
    if is_lazy(found.weight):
        raise ValueError(f"{found.name} is not initialized yet: run one forward before sparsify")


def _named_axis(found: Candidate, dim: int) -> Axis:
    ndim = found.weight.ndim
    if not -ndim <= dim < ndim:
        raise ValueError(f"axis: {found.name} has {ndim} dims {tuple(found.weight.shape)}, found dim {dim}")
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
