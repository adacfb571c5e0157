"""Watch which weights really reach a matrix multiplication, and what each costs.

A dispatch mode sees every operator below the modules, whatever path led there: fused attention, functional calls,
weights kept in stale lists. Every tensor is one of three: data, in which the example had a part; a constant, computed
from parameters, buffers and tensors that were there before, recognized by their storage; or generated in this forward
from nothing but shapes and random numbers. A constant is followed through whatever is computed of it, other products
too, until it meets data in a product.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakIdRef

from openwork.nm.groups import Axis
from openwork.training.operands import Factor, Product, in_order, is_product, name_of, products
from openwork.training.parametrize import plain_name, sparse_weights, weight_name
from openwork.training.traces import CONSTANT, DATA, VECTOR, Trace, Traced, after, is_activation
from openwork.utils.example import quiet, run, tensors_of
from openwork.utils.torch_private import TorchDispatchMode, tree_leaves


def flop_formulas() -> dict[Any, Any]:
    """torch's own counts of multiply-adds by operator. Imported when asked for: it brings Triton along."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry


_SUMS = {"sum", "mean"}
_FOLLOWED = ("aten", "prim", "prims", "torchvision", "torchaudio", "openwork")  # the others are somebody's own


@dataclass(frozen=True)
class Operand:
    """One constant operand of a product. `names`: the parameters and buffers it comes from; none of a tensor that is
    none of them. `axes`: those that the product sums over."""

    names: frozenset[str]
    tensor: Tensor | None
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Multiplied:
    """A product with constant operands. `inside` is the innermost module that ran then; `with_data` says that data
    has a part in it, else it makes one constant of others. `tensor` is None of an operand that cannot be read. `data`
    are the other operands, and `arguments` all that the operator is given, in the order of its schema."""

    operator: str
    inside: str
    operands: tuple[Operand, ...]
    with_data: bool = True
    data: tuple[Factor, ...] = ()
    arguments: tuple[Any, ...] = ()


Visit = Callable[[Multiplied], None]
Follow = Callable[[Any, Any, Traced, Tensor], None]


def watch(
    model: nn.Module,
    example: Any,
    visit: Visit,
    *,
    names: Mapping[int, str] | None = None,
    follow: Follow | None = None,
) -> None:
    """Run `model` on `example` in eval mode without gradients, and show `visit` each product of a constant.

    `names`: those of weights by their id, else each has that of the plain model. `follow` is shown each tensor that is
    computed: the operator, its arguments, the tensors among them with their traces, and the result."""
    watcher = _Watcher(_constants(model, names or {}), example, visit, follow=follow)
    with quiet(model), _uncompiled(), watcher.hooks(model), watcher:
        run(model, example)


def count_macs(
    model: nn.Module, example: Any, weights: Mapping[str, Tensor], visit: Visit | None = None
) -> dict[str, int]:
    """Multiply-adds of one forward pass by the name of the weight, and under "" those of no weight in `weights`.
    `visit` is shown each product of a constant as by `watch`."""
    constants = _constants(model, {id(weight): name for name, weight in weights.items()})
    counter = _Watcher(constants, example, visit, frozenset(weights))
    with quiet(model), _uncompiled(), _without_fused_kernels(), counter.hooks(model), counter:
        run(model, example)
    counted = {name: macs for name, macs in counter.macs.items() if name in weights}
    return counted | {"": counter.macs.total() - sum(counted.values())}


def _constants(model: nn.Module, names: Mapping[int, str]) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, under its name in `names` by its id, or that in the plain model."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(names.get(id(tensor)) or weight_name(name), tensor) for name, tensor in tensors]


class _Watcher(TorchDispatchMode):
    def __init__(
        self,
        weights: list[tuple[str, Tensor]],
        example: Any,
        visit: Visit | None,
        counted: frozenset[str] = frozenset(),
        follow: Follow | None = None,
    ):
        super().__init__()
        self.follow = follow
        self.counted = counted
        self.visit = visit
        self.macs: Counter[str] = Counter()
        self.traces: dict[Hashable, Trace] = {}
        self.stack: list[str] = [""]
        for name, weight in weights:
            own = Trace(True, names=frozenset([name])) if weight.ndim >= 2 else VECTOR  # vectors are no candidates
            self.traces[storage_key(weight)] = own | self.traces.get(storage_key(weight), own)
        for tensor in tensors_of(example):
            self.traces[storage_key(tensor)] = DATA

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = is_product(func) or func._overloadpacket in flop_formulas()
        if not counted and func is not torch.ops.prim.device.default:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        operands = [(tensor, self._trace(tensor)) for tensor in _tensors((args, kwargs))]
        if self.visit:
            self._show(func, args, kwargs, operands)
        out = func(*args, **kwargs)
        self._count(func._overloadpacket, args, kwargs, out, operands)
        self._follow(func, args, operands, out, counted)
        return out

    def _trace(self, tensor: Tensor) -> Trace:
        """What is known of a tensor; one that no operator made was there before."""
        known = self.traces.get(storage_key(tensor))
        if known is None:
            return CONSTANT if tensor.ndim >= 2 else VECTOR
        return known

    def _show(self, func: Any, args: Any, kwargs: Any, operands: Traced) -> None:
        name = name_of(func)
        if is_product(func):
            arguments = in_order(func, args, kwargs)
            for product in products(func, arguments):
                self._show_product(name, product, tuple(arguments))
        if name in _SUMS and operands[0][1].scaled:
            tensor, trace = operands[0]
            dims = args[1] if len(args) > 1 and args[1] is not None else range(tensor.ndim)
            axes = tuple(Axis(dim % tensor.ndim) for dim in ([dims] if isinstance(dims, int) else dims))
            self._visit(name, [Operand(trace.names, tensor, axes)])
        if func.namespace not in _FOLLOWED and not is_product(func):
            self._show_unknown(func, args, operands)

    def _show_product(self, name: str, product: Product, arguments: tuple[Any, ...]) -> None:
        traced = [(factor, self._trace(factor.tensor)) for factor in product]
        is_fixed = [trace.constant and not is_activation(factor, trace) for factor, trace in traced]
        fixed = list(itertools.compress(traced, is_fixed))
        weights = [(factor, trace) for factor, trace in fixed if not trace.vector]
        if weights:
            with_data = len(fixed) < len(traced) or any(trace.meets_data for _, trace in weights)
            operands = [Operand(trace.names, factor.tensor, factor.axes) for factor, trace in weights]
            data = tuple(factor for (factor, _), one in zip(traced, is_fixed, strict=True) if not one)
            self._visit(name, operands, with_data or len(product) == 1, data, arguments)

    def _show_unknown(self, func: Any, args: Any, operands: Traced) -> None:
        """An operator of another library, which may multiply what it is given; one of torch's with packed weights."""
        if not any(trace.from_example for _, trace in operands):
            return
        packed = [_unpacked(each) for each in args if isinstance(each, torch.ScriptObject)]
        found = [Operand(frozenset(), each, (Axis(1),)) for each in packed]
        found += [Operand(trace.names, None, ()) for tensor, trace in operands if trace.constant and tensor.ndim >= 2]
        for operand in found:
            self._visit(str(func._overloadpacket), [operand])

    def _visit(
        self,
        name: str,
        operands: list[Operand],
        with_data: bool = True,
        data: tuple[Factor, ...] = (),
        arguments: tuple[Any, ...] = (),
    ) -> None:
        assert self.visit
        self.visit(Multiplied(name, self.stack[-1], tuple(operands), with_data, data, arguments))

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, operands: Traced) -> None:
        macs = _macs(packet, args, kwargs, out)
        if macs:
            weights = [
                trace.names & self.counted
                for tensor, trace in operands
                if tensor.ndim >= 2 and not (trace.made or trace.meets_data)
            ]
            single = [name for names in weights if len(names) == 1 for name in names]
            self.macs[single[-1] if single else ""] += macs  # the last: the data may be a parameter too

    def _follow(self, func: Any, args: Any, operands: Traced, out: Any, is_product: bool) -> None:
        """Trace what is computed. Views are in a storage that is known; what an operator writes to is what it was
        and what was written."""
        written = {
            storage_key(value)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        }
        for result in _tensors(out):
            key = storage_key(result)
            if key in written or key not in self.traces:
                self.traces[key] = after(name_of(func), operands, is_product)
                if self.follow:
                    self.follow(func, args, operands, result)

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs and of what it is given, and recognize what the masked weights hand out.

        The hooks are global ones: hooks on its modules keep an encoder layer from its fast path.
        """
        names = {module: plain_name(name) for name, module in model.named_modules()}
        masked: dict[nn.Module, str] = {sparse.masked: sparse.name for sparse in sparse_weights(model)}
        lists = [module for module in model.modules() if isinstance(module, ParametrizationList)]
        of_weights = {inner for each in lists for inner in each.modules()}

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(names.get(module, self.stack[-1]))
            if module not in of_weights:
                for tensor in _tensors(args):
                    trace = self._trace(tensor)
                    if trace.constant:
                        self.traces[storage_key(tensor)] = replace(trace, fed=True)

        def leave(module: nn.Module, _: Any, out: Any) -> None:
            self.stack.pop()
            if module in masked and isinstance(out, Tensor):  # it is not where the forward failed
                self.traces[storage_key(out)] = Trace(True, names=frozenset([masked[module]]))

        with register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True):
            yield


def _unpacked(packed: Any) -> Tensor | None:
    """The weight in an object of torch's quantized layers; None where it gives none."""
    try:
        weight = packed.unpack()[0]
    except (AttributeError, RuntimeError, TypeError, IndexError):
        return None
    return weight if isinstance(weight, Tensor) else None


def _macs(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet in flop_formulas():
        return flop_formulas()[packet](*args, **kwargs, out_val=out) // 2
    aten = torch.ops.aten  # what torch's counter leaves out
    if packet in (aten.mv, aten.addmv):
        return args[-2].numel()
    grouped = packet.__name__ in ("_grouped_mm", "grouped_mm_fallback")
    return out.numel() * args[0].shape[-1] if grouped else 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_key(tensor: Tensor) -> Hashable:
    """What equals for tensors of one memory, and never for those of a memory that was freed and taken again."""
    if tensor.layout != torch.strided or tensor.is_mkldnn:
        return WeakIdRef(tensor)
    return StorageWeakRef(tensor.untyped_storage())


@contextlib.contextmanager
def _without_fused_kernels() -> Iterator[None]:
    """Attention and RNNs as plain matmuls, which can be counted."""
    with without_fast_path(), without_onednn(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Encoder layers as the operators that they are made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """RNNs as the products that they are made of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the flags also set TF32, which warns without an Intel GPU
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written, where the operators can be seen. Since torch 2.6."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with stance("force_eager"):
        yield
