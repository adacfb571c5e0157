"""What runs in the place of a network's forward: a list of steps, in which activations stay bytes between layers.

A step is a function and its arguments; some of these are what earlier steps gave. Weights are looked up in the layers
at each call, so whatever is loaded into them counts.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from openwork.inference.layers import PackedConv2d
from openwork.ops.bytes import Form
from openwork.utils.caller import outside
from openwork.utils.torch_private import tree_flatten, tree_unflatten

_OPERATOR = type(torch.ops.aten.add.Tensor)


class Ref(NamedTuple):
    """What a step gave, by its place."""

    place: int


@dataclass(frozen=True)
class Step:
    """One function and where its result goes; afterwards the values at `last` are not needed any more."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    to: int
    last: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "function": _named(self.function), "args": _named(self.args)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "function": _from_name(state["function"]), "args": _from_name(state["args"])})


class Filled:
    """A function whose arguments have values of other steps within lists, or by name: it is given these in order."""

    def __init__(self, function: Any, args: Any, kwargs: Any, refs: tuple[Ref, ...]):
        self.function, self.arguments, self.refs = function, (tuple(args), dict(kwargs)), refs

    def __call__(self, *given: Any) -> Any:
        by_ref = dict(zip(self.refs, given, strict=True))
        args, kwargs = _filled(self.arguments, by_ref)
        return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "function": _named(self.function), "arguments": _named(self.arguments)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {name: _from_name(state[name]) for name in ("function", "arguments")}
        vars(self).update({**state, **names})


def _filled(tree: Any, by_ref: Mapping[Ref, Any]) -> Any:
    if type(tree) is Ref:
        return by_ref[tree]
    return _mapped(lambda each: _filled(each, by_ref), tree)


class _Name(NamedTuple):
    """What torch does not pickle, or not in every protocol: an operator, a memory format."""

    of: str
    name: str


def _named(tree: Any) -> Any:
    """The same with names for operators and memory formats."""
    if isinstance(tree, _OPERATOR):
        return _Name("ops", str(tree))
    if isinstance(tree, torch.memory_format):
        return _Name("torch", str(tree).removeprefix("torch."))
    return _mapped(_named, tree)


def _from_name(tree: Any) -> Any:
    if type(tree) is _Name:
        return operator.attrgetter(tree.name)(torch.ops if tree.of == "ops" else torch)
    return _mapped(_from_name, tree)


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Lists, tuples and dicts of any kind as plain ones, each value changed; anything else, a named tuple too, as it
    is."""
    if isinstance(tree, dict):
        return {key: change(each) for key, each in tree.items()}
    if isinstance(tree, list):
        return [change(each) for each in tree]
    return tuple(map(change, tree)) if isinstance(tree, tuple) and not hasattr(tree, "_fields") else tree


class Constant:
    """A tensor of the graph."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __call__(self) -> Tensor:
        return self.tensor


class Stored:
    """A parameter or buffer of a module, whatever it is when asked."""

    def __init__(self, module: nn.Module, key: str):
        self.module, self.key = module, key

    def __call__(self) -> Any:
        found = self.module._parameters.get(self.key)
        return self.module._buffers[self.key] if found is None else found


class Product:
    """A packed layer on bytes, with what follows it."""

    def __init__(self, layer: Any, scale: float, form: Form):
        self.layer, self.scale = layer, scale
        self.whole, self.scales = form.arguments
        self.zero = form.zero
        self._of: Any = None
        self._outputs: list[Tensor] = []

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        packed = self.layer._modules["packed"]
        given = (x, packed.tensors(), self._rows(packed), packed.integers, residual, self.whole, self.scales)
        if isinstance(self.layer, PackedConv2d):
            return torch.ops.openwork.bytes_conv2d.default(*given, self.layer.form.conv.numbers)
        return torch.ops.openwork.bytes_linear.default(*given)

    def _rows(self, packed: Any) -> list[Tensor]:
        """Scales, bias and sums of each output, made again where the layer's numbers are others than before."""
        bias = self.layer._parameters["bias"]
        of = None
        if not torch.compiler.is_compiling():
            watched = (packed.values, packed.scales, bias)
            of = tuple((id(each), 0 if each.is_inference() else each._version) for each in watched if each is not None)
        if not self._outputs or (of is not None and of != self._of):
            with torch.no_grad():
                added = packed.scales.new_zeros(packed.shape[0]) if bias is None else bias.detach().float()
                sums = packed.unpack().sum(1, dtype=torch.int32)
                self._outputs = [packed.scales * self.scale, added, sums]
            self._of = of
        return self._outputs

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_of": None, "_outputs": []}


class Program:
    """Called like the forward of `model`, whose layers it uses. What is called otherwise than the example, in other
    shapes but for the batch, in other dtypes, or while the model trains, runs layer by layer, and the first time a
    warning says so."""

    _is_left_alone: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Program:
        """Compilers leave programs as they are: their steps are operators already. Said when the first one is made or
        unpickled, since it imports torch's compiler."""
        if not cls._is_left_alone:
            cls.__call__, cls._is_left_alone = torch.compiler.disable(cls.__call__), True  # type: ignore[method-assign]
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        steps: list[Step],
        places: int,
        call: Call,
        results: tuple[Any, ...],
        result_tree: Any,
    ):
        self.model, self.steps, self.places, self.call = model, steps, places, call
        self.results, self.result_tree = results, result_tree
        self.layers = [step.function.layer for step in steps if isinstance(step.function, Product)]
        self.has_warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        given = self.call.tensors(args, kwargs)
        reason = given if isinstance(given, str) else self._reason(given)
        if reason:
            return self._layer_by_layer(reason, args, kwargs)
        with torch.no_grad():
            return self.run(given)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "result_tree": _numbered(self.result_tree)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "result_tree": tree_flatten(state["result_tree"])[1]})

    def run(self, given: list[Tensor]) -> Any:
        """What the model returns for the tensors of a call, without a look at whether the steps are for it."""
        values: list[Any] = [*given, *[None] * (self.places - len(given))]
        for step in self.steps:
            args = [values[each.place] if type(each) is Ref else each for each in step.args]
            values[step.to] = step.function(*args)
            for place in step.last:
                values[place] = None
        found = [values[each.place] if type(each) is Ref else each for each in self.results]
        return tree_unflatten(found, self.result_tree)

    def _reason(self, given: list[Tensor]) -> str:
        if self.model.training:
            return "the model is in training mode"
        if torch.is_autocast_enabled("cpu"):
            return "of autocast"
        if torch.is_grad_enabled() and any(each.requires_grad for each in given):
            return "an input requires grad"
        for layer in self.layers:
            if layer.dtype != torch.float32 or not layer._is_packed():
                return "a layer was changed"
        return ""

    def _layer_by_layer(self, reason: str, args: Any, kwargs: Any) -> Any:
        if not self.has_warned:
            self.has_warned = True
            text = f"the network runs layer by layer, slower than as the int8 network that was deployed: {reason}"
            warnings.warn(text, stacklevel=outside())
        return type(self.model).forward(self.model, *args, **kwargs)


@dataclass(frozen=True)
class Call:
    """The arguments that a program was made for: their tree; of each tensor its shape and dtype, of all else itself."""

    tree: Any
    leaves: tuple[Any, ...]
    keywords: tuple[str, ...]
    any_batch: bool

    @classmethod
    def of(cls, tree: Any, leaves: tuple[Any, ...], any_batch: bool) -> Call:
        """Of an example's leaves, without its numbers."""
        forms = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        _, kwargs = tree_unflatten(list(leaves), tree)
        return cls(tree, forms, tuple(kwargs), any_batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tree": _numbered(self.tree)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "tree": tree_flatten(state["tree"])[1]})

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | str:
        """The tensors of a call, or why it is none of these."""
        ordered = {name: kwargs[name] for name in self.keywords if name in kwargs}
        leaves, tree = tree_flatten((args, {**ordered, **kwargs}))
        if tree != self.tree:
            return "it was called with other arguments than the example's"
        given, first = [], int(self.any_batch)
        for form, x in zip(self.leaves, leaves, strict=True):
            if not isinstance(x, Tensor):
                if x is not form and x != form:
                    return f"an argument is {x!r}, in the example {form!r}"
                continue
            if not isinstance(form, tuple) or x.dtype != form[1] or len(x.shape) != len(form[0]):
                return f"an input is {tuple(x.shape)} of {x.dtype}, in the example {form}"
            if tuple(x.shape[first:]) != form[0][first:] or (first and x.shape[0] != _batch_of(leaves)):
                return f"an input is {tuple(x.shape)}, in the example {form[0]}"
            given.append(x)
        return given


def _numbered(tree: Any) -> Any:
    """A tree as what it is a tree of, numbers in the places of leaves: torch warns where its own form is pickled."""
    return tree_unflatten(list(range(tree.num_leaves)), tree)


def _batch_of(leaves: list[Any]) -> int:
    """The length of dim 0 of the first tensor."""
    return next(each.shape[0] for each in leaves if isinstance(each, Tensor))


def is_program(model: nn.Module) -> bool:
    """Whether a model's forward is a program."""
    return isinstance(model.__dict__.get("forward"), Program)
