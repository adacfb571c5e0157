"""The class of a module with masked weights: one for each (original class, tensor names), made on demand.

torch makes a class for each instance, which makes regional `torch.compile` recompile for each block. This one also
stands where torch's removal, tensor parallelism and RNNs would go wrong with a weight that is computed.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from openwork.training.computed_weight import is_written
from openwork.training.weight_reads import handed_out


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without masked weights."""
    return getattr(module, "_openwork_class", type(module))


@functools.cache
def shared_class(original: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """The one subclass of `original` whose tensors `names` are read through their parametrizations.

    Being made on demand it cannot be found by name, so its instances say how they are rebuilt: pickle, deepcopy
    and spawned processes work.
    """

    def reduce(self: nn.Module, _: int) -> tuple[Any, ...]:
        state = original.__getstate__(self) if hasattr(original, "__getstate__") else self.__dict__
        return _rebuild, (original, names), state

    members: dict[str, Any] = {"__reduce_ex__": reduce, "__module__": original.__module__, "_openwork_class": original}
    members |= {name: _read_through(name) for name in names}
    members |= {"__getattr__": _saved_beside(original, names)}
    members |= {"register_parameter": _register_parameter, "__delattr__": _refuse_to_remove}
    members |= {"__prepare_scriptable__": _refuse_to_script}
    members["_distribute_module_applied"] = property(_distributed, _set_distributed)
    members["qconfig"] = property(_qconfig, _set_qconfig)
    if issubclass(original, nn.RNNBase):
        members |= {"_flat_weights": property(_fresh_weights, _ignore), "flatten_parameters": _ignore}
    if issubclass(original, nn.ModuleList):
        members |= {"__len__": lambda self: len(_steps(self)), "__iter__": lambda self: iter(_steps(self))}
    kind: Any = type(original)
    return _metaclass(kind, names)(f"Parametrized{original.__name__}", (original,), members)


@functools.cache
def _metaclass(original: Any, names: tuple[str, ...]) -> Any:
    """The class of a shared class: `torch.nn.utils.parametrize.remove_parametrizations` deletes the property from the
    class of a module, and with it that of every other sparse layer in the process."""

    def refuse(cls: Any, name: str) -> None:
        if name in names:
            raise RuntimeError(
                f"removing the parametrization of {name} of a sparsified {cls._openwork_class.__name__}: call "
                "ow.finalize(model), which makes all its layers plain; nothing was changed"
            )
        original.__delattr__(cls, name)

    return type(original.__name__, (original,), {"__delattr__": refuse})


def _rebuild(original: Any, names: tuple[str, ...]) -> nn.Module:
    sparse_class = shared_class(original, names)
    return sparse_class.__new__(sparse_class)


def _read_through(name: str) -> property:
    def read(self: Any) -> Tensor:
        weight: Tensor = self.parametrizations[name]()
        return weight if torch.compiler.is_compiling() else handed_out(weight, self, name, sys._getframe(1))

    def refuse(self: nn.Module, value: object) -> None:
        if not is_written(value, self, name):
            raise _assigned(self, name)

    return property(read, refuse)


def _saved_beside(original: Any, names: tuple[str, ...]) -> Any:
    """Masks, counters and state of the weights `names` under their names in the state dict, where
    `torch.distributed.checkpoint.state_dict` looks for them."""

    def find(self: Any, attribute: str) -> Any:
        try:
            return original.__getattr__(self, attribute)
        except AttributeError:
            for name in names:
                if attribute.startswith(f"{name}_") and "_openwork" in self.__dict__:
                    saved = self.parametrizations[name][0].saved()
                    if attribute.removeprefix(f"{name}_") in saved:
                        return saved[attribute.removeprefix(f"{name}_")]
            raise

    return find


def _register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
    """Where `module.weight = nn.Parameter(...)` leads; torch's own error is only that the name is taken."""
    if name in self.parametrizations:
        raise _assigned(self, name)
    plain_class(self).register_parameter(self, name, param)


def _assigned(module: nn.Module, name: str) -> RuntimeError:
    return RuntimeError(
        f"assigning {name} of a sparsified {plain_class(module).__name__}: it is computed from a dense weight; "
        f"write `with torch.no_grad(): module.parametrizations.{name}.original.copy_(value)`, or finalize first"
    )


def _refuse_to_remove(self: Any, name: str) -> None:
    """torch removes a tensor before it registers a parametrization, and then changes the class, which others share."""
    if name in self._parameters or name in self.parametrizations:
        raise RuntimeError(
            f"removing or parametrizing {name} of a sparsified {plain_class(self).__name__}: call ow.finalize first, "
            "or register other parametrizations before ow.sparsify, which then leaves the module alone; "
            "of torch's two FSDPs only fully_shard (FSDP2) works"
        )
    plain_class(self).__delattr__(self, name)


def _refuse_to_script(self: nn.Module) -> nn.Module:
    raise RuntimeError(
        f"torch.jit.script of a sparsified {plain_class(self).__name__}, whose weight is computed in Python: call "
        "ow.finalize(model) first, or use torch.jit.trace or torch.export"
    )


def _qconfig(self: nn.Module) -> Any:
    if "qconfig" not in self.__dict__:
        raise AttributeError(f"{plain_class(self).__name__} has no attribute 'qconfig'")
    return self.__dict__["qconfig"]


def _set_qconfig(self: nn.Module, value: object) -> None:
    """What `torch.ao.quantization` marks the modules with that it will replace by quantized ones. Those that it has
    made already, before `sparsify`, stay."""
    if value is not None and not hasattr(self, "weight_fake_quant"):
        raise RuntimeError(
            f"a sparsified {plain_class(self).__name__} is to be replaced by a quantized one, without its mask: for "
            "quantization-aware training call prepare_qat before ow.sparsify; to quantize a trained model call "
            "ow.finalize first"
        )
    self.__dict__["qconfig"] = value


class _NotByTorch:
    """The answer to "was this module split over processes?", which only who acts on it may not have: whoever looks at
    all attributes (tracing, debuggers) reads this one too."""

    def __init__(self, kind: str):
        self.kind = kind

    def __bool__(self) -> bool:
        raise RuntimeError(
            f"a sparsified {self.kind} cannot be split by a ParallelStyle of torch's: put Colwise or Rowwise of "
            "openwork.integrations.tensor_parallel into the plan, or leave this layer out of it"
        )


def _distributed(self: nn.Module) -> Any:
    """What torch asks before it splits a module over processes. Its own styles stumble over a masked weight later."""
    return self.__dict__.get("_distribute_module_applied", _NotByTorch(plain_class(self).__name__))


def _set_distributed(self: nn.Module, value: bool) -> None:
    self.__dict__["_distribute_module_applied"] = value


def _steps(self: nn.ModuleList) -> list[Any]:
    """The entries of a list, such as torch's of parametrizations, without what is registered beside them."""
    return [module for name, module in self._modules.items() if name.isdecimal()]


def _fresh_weights(self: nn.RNNBase) -> list[Tensor | None]:
    """What an RNN hands its kernel. torch keeps this list between forwards, where it would go stale."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore(self: nn.Module, value: object = None) -> None:
    pass
