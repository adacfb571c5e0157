"""The class of a module with masked weights: one for each (original class, tensor names), made on demand.

torch makes a class for each instance, which makes regional `torch.compile` recompile for each block. This one also
stands where torch's removal, tensor parallelism and RNNs would go wrong with a weight that is computed.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


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
    members["_distribute_module_applied"] = property(_distributed, _set_distributed)
    if issubclass(original, nn.RNNBase):
        members |= {"_flat_weights": property(_fresh_weights, _ignore), "flatten_parameters": _ignore}
    return type(f"Parametrized{original.__name__}", (original,), members)


def _rebuild(original: Any, names: tuple[str, ...]) -> nn.Module:
    sparse_class = shared_class(original, names)
    return sparse_class.__new__(sparse_class)


def _read_through(name: str) -> property:
    def read(self: Any) -> Tensor:
        return self.parametrizations[name]()

    def refuse(self: nn.Module, value: object) -> None:
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


def _distributed(self: nn.Module) -> bool:
    """What torch asks before it splits a module over processes. Its own styles stumble over a masked weight later."""
    if "_distribute_module_applied" not in self.__dict__:
        raise RuntimeError(
            f"a sparsified {plain_class(self).__name__} cannot be split by a ParallelStyle of torch's: put Colwise or "
            "Rowwise of openwork.integrations.tensor_parallel into the plan, or leave this layer out of it"
        )
    return self.__dict__["_distribute_module_applied"]


def _set_distributed(self: nn.Module, value: bool) -> None:
    self.__dict__["_distribute_module_applied"] = value


def _fresh_weights(self: nn.RNNBase) -> list[Tensor | None]:
    """What an RNN hands its kernel. torch keeps this list between forwards, where it would go stale."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore(self: nn.Module, value: object = None) -> None:
    pass
