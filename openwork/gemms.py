"""Watch which weights really reach a matrix product, and what each costs.

A dispatch mode sees every operator below the modules, whatever path led there: fused attention, functional calls,
weights kept in stale lists. Weights are recognized by their storage, and followed through casts and arithmetic.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from openwork.parametrization import Masked, masked_modules, masked_weights, plain_name, weight_name

# The products, each with the positions of its weights among the arguments. Weights that are recognized count anywhere.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    "mm": (1,),
    "addmm": (2,),
    "_addmm_activation": (2,),
    "convolution": (1,),
    "linear": (1,),
    "mkldnn_linear": (1,),
    "bmm": (),
    "baddbmm": (),
    "mv": (),
    "addmv": (),
    "_int_mm": (),
    "_scaled_mm": (),
    "_grouped_mm": (),
    "mkldnn_rnn_layer": (1, 2),
    "_cudnn_rnn": (),
    "_native_multi_head_attention": (5, 7),
    "_transformer_encoder_layer_fwd": (3, 5, 14, 16),
}


@dataclass(frozen=True)
class Use:
    """One weight-like operand of one product. `names`: the parameters it comes from; none if it is unknown.

    `inside` is the innermost module that ran then; `whole` says that `operand` shares the storage of the one
    parameter or masked weight it comes from, which is then `operand`.
    """

    names: frozenset[str]
    operand: Tensor
    inside: str
    whole: bool


def watch(model: nn.Module, example: Any, visit: Callable[[Use], None]) -> None:
    """Run `model` on `example` in eval mode without gradients, and show `visit` each weight that is multiplied."""
    weights = {weight_name(name): each for name, each in model.named_parameters()}
    watcher = _Watcher(weights, visit)
    with _quiet(model), watcher.hooks(model), watcher:
        run(model, example)


def count_macs(model: nn.Module, example: Any, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-adds of one forward pass by the name of the weight, and under "" those of no weight in `weights`."""
    counter = _Watcher(weights, None)
    with _quiet(model), _without_fused_kernels(), counter:
        run(model, example)
    return dict(counter.macs)


def run(model: nn.Module, example: Any) -> Any:
    """Call the model: a tuple is its arguments, a dict its keyword arguments, anything else its one argument."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@dataclass(frozen=True)
class _Origin:
    names: frozenset[str]
    whole: Tensor | None


class _Watcher(TorchDispatchMode):
    def __init__(self, weights: Mapping[str, Tensor], visit: Callable[[Use], None] | None):
        super().__init__()
        self.visit = visit
        self.macs: Counter[str] = Counter()
        self.origins: dict[int, _Origin] = {}
        self.alive: list[Tensor] = []  # a freed storage could give its address to another
        self.stack: list[str] = [""]
        self.masking = 0
        for name, weight in weights.items():
            self.tag(weight, _Origin(frozenset([name]), weight))

    def tag(self, tensor: Tensor, origin: _Origin) -> None:
        self.origins[_storage(tensor)] = origin
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.masking:
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name not in _PRODUCTS and func._overloadpacket not in flop_registry:
            decomposed = func.decompose(*args, **kwargs) if func is not torch.ops.prim.device.default else NotImplemented
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in _PRODUCTS:
            self._product(name, args, tensors)
        if func._overloadpacket in flop_registry:
            self._count(func._overloadpacket, args, kwargs, out, tensors)
        self._follow(tensors, out, name in _PRODUCTS)
        return out

    def _product(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        if self.visit is None:
            return
        weights = [args[i] for i in _PRODUCTS[name]]
        for tensor in tensors:
            origin = self.origins.get(_storage(tensor))
            if origin and tensor.ndim >= 2:
                whole = origin.whole is not None
                self.visit(Use(origin.names, origin.whole if whole else tensor, self.stack[-1], whole))
            elif not origin and any(tensor is each for each in weights):
                self.visit(Use(frozenset(), tensor, self.stack[-1], False))

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        macs = flop_registry[packet](*args, **kwargs, out_val=out) // 2
        origins = [self.origins.get(_storage(each)) for each in tensors if each.ndim >= 2]
        names = [next(iter(each.names)) for each in origins if each and len(each.names) == 1]
        self.macs[names[0] if len(names) == 1 else ""] += macs

    def _follow(self, tensors: list[Tensor], out: Any, product: bool) -> None:
        """Tag what is computed from weights alone: casts, sums and products of weights."""
        if not isinstance(out, Tensor) or out.layout != torch.strided or _storage(out) in self.origins:
            return
        known = [(each, self.origins[_storage(each)]) for each in tensors if _storage(each) in self.origins]
        of_weights = known and len(known) == len(tensors)
        like_a_weight = not product and any(each.shape == out.shape and each.ndim >= 2 for each, _ in known)
        if of_weights or like_a_weight:
            self.tag(out, _Origin(frozenset().union(*(origin.names for _, origin in known)), None))

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that runs, and recognize what the masked weights hand out."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(_call(self.stack.append, plain_name(name)), prepend=True))
            handles.append(module.register_forward_hook(_call(self.stack.pop), always_call=True))
        for name, module in masked_modules(model):
            for tensor, masked, _ in masked_weights(module):
                handles += self._masked_hooks(f"{name}.{tensor}".lstrip("."), masked)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _masked_hooks(self, name: str, masked: Masked) -> list[Any]:
        def before(*_: Any) -> None:
            self.masking += 1

        def after(_: nn.Module, __: Any, out: Tensor) -> None:
            self.masking -= 1
            self.tag(out, _Origin(frozenset([name]), out))

        return [masked.register_forward_pre_hook(before), masked.register_forward_hook(after)]


def _call(function: Callable[..., Any], *args: Any) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        function(*args)

    return hook


def _storage(tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_mkldnn:
        return id(tensor)
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and afterwards every training flag and random state as it was."""
    flags = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def _without_fused_kernels() -> Iterator[None]:
    """Attention and RNNs as plain products, which can be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():  # the flags also set TF32, which warns without an Intel GPU
            warnings.simplefilter("ignore", UserWarning)
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
