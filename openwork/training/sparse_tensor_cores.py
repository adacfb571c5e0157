"""Train on sparse tensor cores: with transposable masks, two of the three matmuls of a linear layer run sparse.

    y = x w~' + b          sparse: w~ is 2:4 along its rows
    dx = dy w~             sparse: w~ is 2:4 along its columns too, which is what transposable masks are for
    dw = dy' x             dense: neither operand is sparse

After each optimizer step a layer's weight is packed twice, as w~ and as its transpose, when it is first used. Micro-
batches and recomputed forwards share what was packed. Matmuls and packing are torch's own, by cuSPARSELt.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openwork.kernels.cuda import cusparselt
from openwork.kernels.cuda.cusparselt import BACKENDS
from openwork.kernels.cuda.stream import on_device
from openwork.layouts.layout import Algorithm
from openwork.nm.masks import apply_mask
from openwork.nm.pattern import within_2_4
from openwork.training.accelerated_linear import Engine, SparseMatmul, accelerated_class
from openwork.training.masked import Masked
from openwork.training.parametrize import sparse_weights, unwrap
from openwork.training.shared_class import plain_class
from openwork.utils.caller import outside
from openwork.utils.counted import counted
from openwork.utils.example import quiet, run
from openwork.utils.table import aligned
from openwork.utils.timing import clock

_BACKEND = "cusparselt"
_MULTIPLE = 16  # of rows and columns that it takes in 16-bit types


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: `sparse` layers, with (dense, sparse) seconds a step where they were timed, and layers
    left `dense`, with the reason.

    >>> ow.accelerate(model).dense  # doctest: +SKIP
    {'head.weight': 'excluded'}
    """

    sparse: dict[str, tuple[float, float] | None]
    dense: dict[str, str]

    def __str__(self) -> str:
        lines = [[name, "sparse", _ratio(times)] for name, times in self.sparse.items()]
        lines += [[name, "dense", reason] for name, reason in self.dense.items()]
        trains = counted(len(self.sparse), "layer trains", "layers train")
        summary = f"{trains} on sparse tensor cores, {len(self.dense)} dense"
        return "\n".join([*aligned(["layer", "products", "why"], lines), summary])


def _ratio(times: tuple[float, float] | None) -> str:
    return f"{times[0] / times[1]:.2f} x dense" if times else "not timed"


@dataclass(frozen=True)
class SparseTensorCores:
    """The engine of NVIDIA GPUs from compute capability 8.0 on: cuSPARSELt, with the algorithm that its search finds to
    be fastest for each shape. A weight that is packed again after each step is not compared with what comes out again;
    `check` does that once."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    algorithms: dict[tuple[Any, ...], Algorithm] = field(default_factory=dict, compare=False)

    def pack(self, weight: Tensor) -> cusparselt.Packed:
        weight = weight.contiguous()
        O, K = weight.shape
        return cusparselt.Packed(*BACKENDS[_BACKEND].pack(weight), _BACKEND, (O, K), (O, K))

    def multiply(self, x: Tensor, packed: cusparselt.Packed, bias: Tensor | None) -> Tensor:
        key = (len(x), packed.shape, x.dtype, bias is None, x.device)
        if key not in self.algorithms:
            self.algorithms[key] = cusparselt.algorithm_for(x, packed, bias, x.dtype)
        return cusparselt.multiply(x, packed, bias, self.algorithms[key], x.dtype)

    def check(self, weight: Tensor) -> None:
        """Raise RuntimeError where the library packs a weight wrongly, or its transpose."""
        for matrix in (weight, weight.t()):
            cusparselt.pack_2_4(matrix.detach().to(self.dtypes[0]).contiguous(), _BACKEND)


def accelerate(model: nn.Module, example: Any = None) -> Acceleration:
    """Let the linear layers of a model multiply on sparse tensor cores while it trains, in place: forward, and gradient
    of the input. Returns which do, and why others do not.

    The model was sparsified with `ow.TransposableSRSTE` at 2:4, or a pattern within it such as 1:4, and is on an NVIDIA
    GPU of compute capability 8.0 or newer. Only products in bfloat16 and float16 are sparse, so train under autocast or
    in such a dtype; others run dense, and a warning says so. With `example`, one input as in training, each layer is
    timed both ways, packing included, and stays dense where sparse is not faster. Under `torch.compile` the layers are
    called as they are, between compiled graphs. `finalize` undoes it.

    Nothing else changes: masks, decay, checkpoints and results but for rounding are those of the same training without
    it. Raises ValueError where no layer can be accelerated, RuntimeError where there are no sparse tensor cores.

    >>> _ = ow.sparsify(model, "2:4", ow.TransposableSRSTE())  # doctest: +SKIP
    >>> ow.accelerate(model, example).sparse  # doctest: +SKIP
    {'0.weight': (0.0021, 0.0016)}
    """
    model = unwrap(model)
    layers = _layers(model)
    device = next(layer.device for layer in layers.values())
    _check_tensor_cores(device)
    engine = SparseTensorCores()
    with on_device(device):
        for layer in layers.values():
            if not layer.reason:
                engine.check(apply_mask(layer.weight.detach(), layer.masked.mask_at_end(layer.weight)))
        return accelerate_with(engine, model, layers, example)


@dataclass(frozen=True)
class LayerChoice:
    """One module with masked weights, and why it must stay dense, or nothing."""

    module: nn.Module
    masked: Masked
    weight: Tensor
    reason: str

    @property
    def device(self) -> torch.device:
        return self.weight.device


def _layers(model: nn.Module) -> dict[str, LayerChoice]:
    layers = {
        sparse.name: LayerChoice(sparse.module, sparse.masked, sparse.weight, _unfit(*sparse[1:]))
        for sparse in sparse_weights(model)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} is not sparsified: call ow.sparsify(model, '2:4', method) first")
    if not any(layer.masked.end.output_axis for layer in layers.values()):
        method = next(iter(layers.values())).masked.method
        raise ValueError(
            f"{type(model).__name__} is sparsified with {method}, whose masks are not transposable: in the gradient of "
            "the input the weight would not be sparse; use ow.TransposableSRSTE()"
        )
    if all(layer.reason for layer in layers.values()):
        listed = "\n".join(f"  {name}: {layer.reason}" for name, layer in layers.items())
        raise ValueError(f"{type(model).__name__} has no layer that can be accelerated:\n{listed}")
    return layers


def _unfit(module: nn.Module, tensor_name: str, masked: Masked, weight: Tensor) -> str:
    if tensor_name != "weight" or plain_class(module) is not nn.Linear:
        return f"{plain_class(module).__name__}: only nn.Linear is accelerated"
    if not masked.method.transposable or not within_2_4(masked.end.pattern):
        return f"{masked.end.pattern} is not within 2:4"
    if any(length % _MULTIPLE for length in weight.shape):
        return f"shape {tuple(weight.shape)}: needed multiples of {_MULTIPLE}"
    return ""


def _check_tensor_cores(device: torch.device) -> None:
    missing = BACKENDS[_BACKEND].missing(device)
    if missing:
        raise RuntimeError(
            f"the model is on {device}: {missing}; training runs without ow.accelerate all the same, at the speed of "
            "dense matmuls"
        )
    if warning := cusparselt.version_warning(device):
        warnings.warn(warning, stacklevel=outside())


def accelerate_with(engine: Engine, model: nn.Module, layers: dict[str, LayerChoice], example: Any) -> Acceleration:
    """`accelerate` by any engine."""
    dense = {name: layer.reason for name, layer in layers.items() if layer.reason}
    able = {name: layer for name, layer in layers.items() if not layer.reason}
    times = dict.fromkeys(able) if example is None else _timed(engine, model, able, example)
    sparse: dict[str, tuple[float, float] | None] = {}
    for name, layer in able.items():
        measured = times.get(name)
        if example is not None and not measured:
            dense[name] = "not reached by the example"
        elif measured and measured[1] >= measured[0]:
            dense[name] = f"sparse is slower: {measured[0] / measured[1]:.2f} x dense"
        else:
            sparse[name] = measured
            layer.module.__dict__["_openwork_matmul"] = SparseMatmul(engine)
            kinds: Any = (plain_class(layer.module), type(layer.module))
            layer.module.__class__ = accelerated_class(*kinds)
    return Acceleration(sparse, dense)


def _timed(
    engine: Engine, model: nn.Module, layers: dict[str, LayerChoice], example: Any
) -> dict[str, tuple[float, float] | None]:
    """Seconds of the layers' matmuls for one step on an example, dense and sparse. Sparse includes packing."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.module.register_forward_hook(functools.partial(_note, inputs, name)) for name, layer in layers.items()
    ]
    try:
        with quiet(model):
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _times(engine, layers[name], x) for name, x in inputs.items()}


def _note(inputs: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    inputs[name] = args[0].detach()


def _times(engine: Engine, layer: LayerChoice, x: Tensor) -> tuple[float, float]:
    kind = x.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    dtype = wanted if wanted in engine.dtypes else engine.dtypes[0]
    x = x.to(dtype).reshape(-1, x.shape[-1])
    weight: Any = layer.module.weight
    weight = weight.detach().to(dtype)
    grad = torch.ones(len(x), len(weight), dtype=dtype, device=x.device)

    def dense() -> None:
        nn.functional.linear(x, weight)
        _ = grad @ weight

    def sparse() -> None:
        engine.multiply(x, engine.pack(weight), None)
        engine.multiply(grad, engine.pack(weight.t()), None)

    times = clock(x.device)({"dense": dense, "sparse": sparse})
    return times["dense"], times["sparse"]
