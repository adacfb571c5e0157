"""Watch which weights really reach a matrix multiplication, and what each costs.

A dispatch mode sees every operator below the modules, whatever path led there: fused attention, functional calls,
weights kept in stale lists. Weights are recognized by their storage, and followed through casts and arithmetic.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdRef

from openwork.training.parametrize import plain_name, sparse_weights, weight_name
from openwork.utils.example import quiet, run
from openwork.utils.torch_private import TorchDispatchMode, tree_leaves


def flop_formulas() -> dict[Any, Any]:
    """torch's own counts of multiply-adds by operator. Imported when asked for: it brings Triton along."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry


# Operators that multiply matrices, under the names that reach a dispatch mode.
_MATMULS = {
    "mm",
    "addmm",
    "_addmm_activation",
    "bmm",
    "baddbmm",
    "mv",
    "addmv",
    "convolution",
    "linear",
    "mkldnn_linear",
    "mkldnn_rnn_layer",
    "_cudnn_rnn",
    "_int_mm",
    "_scaled_mm",
    "_grouped_mm",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
_LOOKUPS = {"embedding", "gather", "index", "index_select"}  # their first tensor is a table of whole rows


@dataclass(frozen=True)
class Operand:
    """One weight-like operand of one matmul. `names`: the parameters it comes from; none if it is unknown.

    `inside` is the innermost module that ran then. An operand that shares the storage of a parameter or of a masked
    weight is given as that whole tensor.
    """

    names: frozenset[str]
    tensor: Tensor
    inside: str


def watch(model: nn.Module, example: Any, visit: Callable[[Operand], None]) -> None:
    """Run `model` on `example` in eval mode without gradients, and show `visit` each weight that is multiplied."""
    tensors = {weight_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    watcher = _Watcher(tensors, example, visit)
    with quiet(model), watcher.hooks(model), watcher:
        run(model, example)


def count_macs(model: nn.Module, example: Any, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-adds of one forward pass by the name of the weight, and under "" those of no weight in `weights`."""
    counter = _Watcher(weights, example, None)
    with quiet(model), _without_fused_kernels(), counter:
        run(model, example)
    return dict(counter.macs)


@dataclass(frozen=True)
class _Trace:
    """What is known of the tensors in one storage: the parameters they come from, the parameter or masked weight
    that they are, and whether the example or a matmul had a part in them."""

    names: frozenset[str] = frozenset()
    whole: Tensor | None = None
    from_example: bool = False
    from_matmul: bool = False


_UNKNOWN = _Trace()


class _Watcher(TorchDispatchMode):
    def __init__(self, weights: Mapping[str, Tensor], example: Any, visit: Callable[[Operand], None] | None):
        super().__init__()
        self.visit = visit
        self.macs: Counter[str] = Counter()
        self.traces: dict[Hashable, _Trace] = {}
        self.stack: list[str] = [""]
        for tensor in _tensors(dict(example) if isinstance(example, Mapping) else example):
            self.traces[_storage(tensor)] = _Trace(from_example=True)
        for name, weight in weights.items():
            self.traces[_storage(weight)] = _Trace(frozenset([name]), weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        counted = name in _MATMULS or func._overloadpacket in flop_formulas()
        if not counted and func is not torch.ops.prim.device.default:
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        operands = [(tensor, self.traces.get(_storage(tensor), _UNKNOWN)) for tensor in _tensors((args, kwargs))]
        if name in _MATMULS and self.visit:
            self._show(operands)
        self._count(func._overloadpacket, args, kwargs, out, operands)
        self._follow(name, operands, out)
        return out

    def _show(self, operands: list[tuple[Tensor, _Trace]]) -> None:
        assert self.visit
        for tensor, trace in operands:
            if tensor.ndim >= 2 and (trace.names or not (trace.from_example or trace.from_matmul)):
                whole = tensor if trace.whole is None else trace.whole
                self.visit(Operand(trace.names, whole, self.stack[-1]))

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, operands: list[tuple[Tensor, _Trace]]) -> None:
        macs = _macs(packet, args, kwargs, out)
        if macs:
            weights = [trace.names for tensor, trace in operands if tensor.ndim >= 2 and not trace.from_example]
            single = [name for names in weights if len(names) == 1 for name in names]
            self.macs[single[-1] if single else ""] += macs  # the last: the data may be a parameter too

    def _follow(self, name: str, operands: list[tuple[Tensor, _Trace]], out: Any) -> None:
        """Trace what is computed. Casts, sums and selections of weights are traced to their names; what a matmul
        made, or the example had a part in, is data."""
        traces = [trace for _, trace in operands]
        from_example = any(trace.from_example for trace in traces)
        from_matmul = name in _MATMULS or any(trace.from_matmul for trace in traces)
        for result in _tensors(out):
            key = _storage(result)
            if not self.traces.get(key, _UNKNOWN).names:
                names = _names_after(name, operands, result, from_example)
                self.traces[key] = _Trace(names, None, from_example, from_matmul)

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs, and recognize what the masked weights hand out.

        The hooks are global ones: hooks on its modules keep an encoder layer from its fast path.
        """
        names = {module: plain_name(name) for name, module in model.named_modules()}
        masked: dict[nn.Module, str] = {sparse.masked: sparse.name for sparse in sparse_weights(model)}

        def before(module: nn.Module, _: Any) -> None:
            self.stack.append(names.get(module, self.stack[-1]))

        def after(module: nn.Module, _: Any, out: Any) -> None:
            self.stack.pop()
            if module in masked and isinstance(out, Tensor):  # it is not where the forward failed
                self.traces[_storage(out)] = _Trace(frozenset([masked[module]]), out)

        with register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True):
            yield


def _names_after(name: str, operands: list[tuple[Tensor, _Trace]], out: Tensor, from_example: bool) -> frozenset[str]:
    """The parameters whose values an operator's result holds; none where it is data."""
    known = [(tensor, trace.names) for tensor, trace in operands if trace.names]
    if not known or name in _MATMULS:
        return frozenset()
    if name in _LOOKUPS:
        return operands[0][1].names
    of_weights = len(known) == len(operands)
    like_a_weight = any(tensor.shape == out.shape and tensor.ndim >= 2 for tensor, _ in known)
    if len(operands) > 1 and (from_example or not (of_weights or like_a_weight)):
        return frozenset()
    return frozenset().union(*(names for _, names in known))


def _macs(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet in flop_formulas():
        return flop_formulas()[packet](*args, **kwargs, out_val=out) // 2
    aten = torch.ops.aten  # what torch's counter leaves out
    if packet in (aten.mv, aten.addmv):
        return args[-2].numel()
    return out.numel() * args[0].shape[-1] if packet is aten._grouped_mm else 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> Hashable:
    """What equals for tensors of one memory, and never for those of a memory that was freed and taken again."""
    if tensor.layout != torch.strided or tensor.is_mkldnn:
        return WeakIdRef(tensor)
    return StorageWeakRef(tensor.untyped_storage())


@contextlib.contextmanager
def _without_fused_kernels() -> Iterator[None]:
    """Attention and RNNs as plain matmuls, which can be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore", UserWarning)  # the flags also set TF32, which warns without an Intel GPU
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
