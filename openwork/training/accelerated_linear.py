"""A linear layer that multiplies with its masked weight packed: forward, and gradient of its input."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openwork.kernels.cuda.stream import capturing
from openwork.nm.pattern import within_2_4
from openwork.training.forward_cache import change_of
from openwork.training.parametrize import masked_weights
from openwork.training.shared_class import shared_class
from openwork.utils.caller import outside


class Engine(Protocol):
    """Matmuls with a packed 2:4 matrix."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """In which it multiplies."""

    def pack(self, weight: Tensor) -> Any:
        """A matrix (O, K), 2:4 along K, in the form that `multiply` takes."""

    def multiply(self, x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """x w' + bias: (B, K) -> (B, O)."""


@dataclass
class SparseMatmul:
    """How one layer multiplies, and its packed weight while that has not changed. Copies start without one.

    A replay of a CUDA graph changes the weight where no count can tell: once one was captured, packing is part of each
    matmul, in the graph and out of it."""

    engine: Engine
    key: Any = None
    packed: tuple[Any, Any] = (None, None)
    warned: bool = field(default=False)
    captured: bool = field(default=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseMatmul, (self.engine,)

    def multiply(self, x: Tensor, layer: nn.Module) -> Tensor:
        """What the layer gives for an input."""
        weight: Any = layer.weight
        bias: Any = layer.bias
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if dtype not in self.engine.dtypes:
            self._warn(dtype)
            return nn.functional.linear(x, weight, bias)
        _, masked, latent = masked_weights(layer)[0]
        if not (masked.phase.is_pattern and within_2_4(masked.phase.pattern)):
            return nn.functional.linear(x, weight, bias)  # while a schedule says so
        key = (change_of(latent), id(latent), masked.mask._version if masked.mask is not None else 0, dtype)
        weight, bias, rows = (
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            x.to(dtype).reshape(-1, x.shape[-1]),
        )
        self.captured = self.captured or capturing(x)
        if key != self.key or self.captured:
            self.key, self.packed = key, (self.engine.pack(weight.detach()), None)
        if rows.requires_grad and torch.is_grad_enabled() and self.packed[1] is None:
            self.packed = (self.packed[0], self.engine.pack(weight.detach().t()))
        y: Tensor = _SparseLinear.apply(rows, weight, bias, self.engine, *self.packed)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _warn(self, dtype: torch.dtype) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"a layer of ow.accelerate multiplies in {dtype}, which sparse tensor cores do not take, so it runs "
                "dense: train under torch.autocast or in bfloat16",
                stacklevel=outside(),
            )


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, engine: Engine, packed: Any, packed_t: Any
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.engine, ctx.packed_t = engine, packed_t
        return engine.multiply(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        return (
            ctx.engine.multiply(grad, ctx.packed_t, None) if to_x else None,
            grad.t() @ x if to_weight else None,
            grad.sum(0) if to_bias else None,
            None,
            None,
            None,
        )


@functools.cache
def accelerated_class(original: Any, sparse: Any) -> type[nn.Module]:
    """The class of accelerated layers: `sparse`, which reads a masked weight, with another forward."""

    between_graphs: Any = torch.compiler.disable(SparseMatmul.multiply)  # here, as it imports the compiler

    def forward(self: nn.Module, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        y: Tensor = between_graphs(self.__dict__["_openwork_matmul"], input, self)
        return y

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        _, (_, names), state = sparse.__reduce_ex__(self, protocol)
        return _rebuild, (original, names), state

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": original.__module__}
    return type(f"Accelerated{original.__name__}", (sparse,), members)


def _rebuild(original: Any, names: tuple[str, ...]) -> Any:
    sparse: Any = shared_class(original, names)
    made: Any = accelerated_class(original, sparse)
    return made.__new__(made)
