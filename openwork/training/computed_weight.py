"""What a module hands out where a masked weight is read: computed values, and writes that reach the dense weight.

`layer.weight` of a sparsified layer is a function of the dense weight, so that a write into it would be lost. A
`ComputedWeight` sends it on: `nn.init.zeros_(layer.weight)`, `layer.weight.data.clamp_(-1, 1)`, `layer.weight[0] = x`
and `reset_parameters` change the dense weight, and the next read is masked anew. Every other function sees a plain
tensor. What cannot be sent on is an error where it happens.

The forward passes of torch's own modules only read, and get the plain tensor; so do compiled and traced code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openwork.training.dtensor import is_sharded
from openwork.utils.torch_private import as_functions_of_tensors, share_memory

Path = Callable[[Tensor], Tensor]
"""How a view comes from the weight that it is a view of."""

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
)
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in _OPERATORS}
_WRITERS = {*_IN_PLACE_OPERATORS, "__setitem__", "__delitem__", "data=", "grad=", "requires_grad="}
_OF_THE_PARAMETER = {"grad", "grad=", "requires_grad=", "requires_grad_"}
"""What concerns the Parameter, and not its values."""
_INIT = "torch.nn.init"
_RANDOM = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_")
_NEVER_FOLLOWED = {*_OF_THE_PARAMETER, *_RANDOM, "data=", "copy_", "zero_", "fill_", "fill_diagonal_", "__setitem__"}
"""What does not compute with the values that it replaces."""
_OF_OTHER_MEMORY = {"resize_", "resize_as_"}


@dataclass
class Source:
    """The weight of a module: the dense one, and what is computed from it until it is written to."""

    module: Any
    name: str
    dense: Tensor
    computed: Tensor | None

    def read(self) -> Tensor:
        if self.computed is None:
            self.computed = self.module.parametrizations[self.name]()
        return self.computed

    def written(self) -> None:
        self.computed = None
        masked = self.module.parametrizations[self.name][0]
        masked.cache.forget(masked)

    def writable(self) -> Tensor:
        """The dense weight. Raises RuntimeError where writing into it is not what writing into the weight would be."""
        steps = self.module.parametrizations[self.name]
        if len(steps) > 1:
            raise RuntimeError(
                f"writing into {self}: beside the mask it has the parametrization {type(steps[1]).__name__}; write "
                f"into module.parametrizations.{self.name}.original instead"
            )
        return self.dense

    def __str__(self) -> str:
        kind = getattr(self.module, "_openwork_class", type(self.module)).__name__
        return f"{self.name} of a sparsified {kind}"


class ComputedWeight(Tensor):
    """A masked weight, or a view of it, whose writes go to the dense weight."""

    _source: Source
    _path: Path
    _known: tuple[Tensor, Tensor]  # what was computed, and this view of it

    @classmethod
    def of(cls, source: Source, path: Path, values: Tensor) -> ComputedWeight:
        if is_sharded(values):
            made: ComputedWeight = values.view_as(values)  # type: ignore[assignment]
            made.__class__ = _sharded_class(cls, type(values))
        else:
            made = values.as_subclass(cls)
        made._source, made._path, made._known = source, path, (source.read(), values)
        return made

    @property
    def _is_param(self) -> bool:
        """Set by `nn.Parameter(layer.weight)`, which makes a Parameter of its own."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def set_(self, *_: Any) -> ComputedWeight:
        raise _other_memory("set_", self._source)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, caller = _name(func), sys._getframe(1)
        if name in ("type", "is_leaf", "retains_grad") and isinstance(args[0], ComputedWeight):
            _check_not_a_parameter(args[0]._source, name, caller)
        if any(not issubclass(cls, each) for each in types):  # fx and others see plain tensors
            return func(*_values(args), **_values(kwargs))
        with as_functions_of_tensors():
            if caller.f_globals.get("__name__") == _INIT or name in _OF_THE_PARAMETER:
                written = _within((args, kwargs))
            else:
                written = _within(_targets(name, args, kwargs))
            if written:
                return _write(func, name, args, kwargs, written)
            return _read(func, name, args, kwargs)


@functools.cache
def _sharded_class(computed: Any, sharded: Any) -> Any:
    """The class of a computed weight that is a DTensor, whose own methods torch calls directly."""

    def through(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return computed.__torch_function__(method, (computed,), (self, *args), kwargs)

        return functools.wraps(method)(call)

    own = {name: through(getattr(sharded, name)) for name in ("to_local", "full_tensor", "redistribute")}
    return type(f"Computed{sharded.__name__}", (computed, sharded), {"__slots__": (), **own})


def is_written(value: object, module: nn.Module, name: str) -> bool:
    """Whether this is what `module.weight *= 2` assigns at last: the weight, in which it has written already."""
    return (
        isinstance(value, ComputedWeight)
        and value._source.module is module
        and value._source.name == name
        and value._path is itself
    )


def itself(weight: Tensor) -> Tensor:
    return weight


def _name(func: Any) -> str:
    """The name of a function, an operator or a property of tensors, the latter with = where it is set."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", "") + ("=" if name == "__set__" else "")
    return name.partition(".")[0] if type(func).__name__ == "OpOverload" else name


def _targets(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments that a function writes into."""
    in_place = name.endswith("_") and not name.endswith("__")
    if not in_place and name not in _WRITERS:
        return (kwargs.get("out"),)
    first = args[0] if args else next((kwargs[key] for key in ("input", "self", "tensor") if key in kwargs), None)
    return first, kwargs.get("out")


def _within(tree: Any) -> list[ComputedWeight]:
    if isinstance(tree, ComputedWeight):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [each for branch in tree for each in _within(branch)] if isinstance(tree, list | tuple) else []


def _mapped(tree: Any, function: Callable[[ComputedWeight], Any]) -> Any:
    if isinstance(tree, ComputedWeight):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _mapped(each, function) for key, each in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(each, function) for each in tree)
    return tree


def _same(weight: ComputedWeight) -> ComputedWeight:
    return weight


def _value(weight: ComputedWeight) -> Tensor:
    computed = weight._source.read()
    if weight._known[0] is not computed:  # it was written to
        weight._known = (computed, weight._path(computed))
    return weight._known[1]


def _values(tree: Any) -> Any:
    return _mapped(tree, _value)


def _write(func: Any, name: str, args: Any, kwargs: Any, written: list[ComputedWeight]) -> Any:
    """Write into the dense weight, or the same view of it: torch refuses what it does of a dense layer. Where autograd
    is to follow how values come from the former ones, the computed ones are changed, as of any result."""
    followed = torch.is_grad_enabled() and any(_value(each).requires_grad for each in written)
    if followed and name not in _NEVER_FOLLOWED and getattr(func, "__module__", "") != _INIT:
        return func(*_values(args), **_values(kwargs))
    twins = {id(each): each._path(each._source.writable()) for each in written}
    sources = [each._source for each in written]

    def replaced(each: ComputedWeight) -> Tensor:
        if id(each) in twins:
            return twins[id(each)]
        same = name == "data=" and any(each._source is source for source in sources)  # of `weight.data *= 2`
        return each._path(each._source.dense) if same else _value(each)

    if name in _OF_OTHER_MEMORY:
        raise _other_memory(name, sources[0])
    if name == "requires_grad_" and written[0]._path is not itself:
        return func(written[0], *args[1:], **kwargs)
    result = func(*_mapped(args, replaced), **_mapped(kwargs, replaced))
    for source in sources:
        source.written()
    return next((each for each in written if twins[id(each)] is result), result)


def _other_memory(name: str, source: Source) -> RuntimeError:
    return RuntimeError(
        f"{name} of {source}: it is computed from a dense weight; call it on "
        f"module.parametrizations.{source.name}.original, or ow.finalize(model) first"
    )


def _read(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Call a function with plain tensors; a view that it returns sends on writes as well."""
    given = _within((args, kwargs))
    values = [_value(each) for each in given]
    versions = [None if each.is_inference() else each._version for each in values]
    result = func(*_values(args), **_values(kwargs))
    for each, value, version in zip(given, values, versions, strict=True):
        if version is not None and value._version != version:
            raise RuntimeError(
                f"{name} wrote into {each._source}, which is computed from a dense weight, so that it would be lost: "
                f"write into module.parametrizations.{each._source.name}.original"
            )
    if isinstance(result, Tensor):
        return _linked(result, func, args, kwargs, given, None)
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(
            _linked(each, func, args, kwargs, given, index) if isinstance(each, Tensor) else each
            for index, each in enumerate(result)
        )
    if isinstance(result, np.ndarray) and any(result.ctypes.data == value.data_ptr() for value in values):
        result.setflags(write=False)
    return result


def _linked(
    result: Tensor, func: Any, args: Any, kwargs: Any, given: list[ComputedWeight], index: int | None
) -> Tensor:
    """The result of a function, where it is a view of a weight as one that sends on writes."""
    origin = next((each for each in given if share_memory(result, _value(each))), None)
    if origin is None or not (type(result) is Tensor or is_sharded(result)):
        return result
    args, kwargs = _mapped((args, kwargs), _same)  # lists may be changed after the call

    def path(weight: Tensor) -> Tensor:
        def from_weight(each: ComputedWeight) -> Tensor:
            return each._path(weight) if each._source is origin._source else _value(each)

        again = func(*_mapped(args, from_weight), **_mapped(kwargs, from_weight))
        return again if index is None else again[index]

    return ComputedWeight.of(origin._source, path, result)


def _check_not_a_parameter(source: Source, name: str, caller: FrameType) -> None:
    """Raise where torch is about to refuse a computed weight, or to take it, as if it had been given a Parameter."""
    asks = caller.f_code.co_name
    assigns = caller.f_back is not None and caller.f_back.f_code.co_name in ("__setattr__", "register_parameter")
    if name == "type" and asks == "typename" and assigns:  # `module.weight = layer.weight`
        raise RuntimeError(
            f"{source}, which is computed, is assigned to another module: tie or replace layers (quantization-aware "
            "training: prepare it) before ow.sparsify, or after ow.finalize"
        )
    if name != "type" and asks == "add_param_group":
        raise ValueError(
            f"{source} is computed from a dense weight: give the optimizer model.parameters(), or "
            f"module.parametrizations.{source.name}.original"
        )
