"""The weight of a deployed layer as other code meets it: a parameter of the dense shape, without its memory.

Code around a model asks parameters for their dtype and device, counts them, reads one here and there. So a deployed
layer has its weight among them. What asks for more than its form is given the dense weight, unpacked for the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openwork.utils.torch_private import tree_map_only, without_memory

_FORM = (
    *("shape", "dtype", "device", "layout", "ndim", "grad", "grad_fn", "requires_grad", "requires_grad_", "itemsize"),
    *("nbytes", "size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device", "type"),
    *("data_ptr", "untyped_storage", "__hash__", "__len__"),
)
"""What is answered without the numbers, by the names of functions, methods and properties, beside `is_...` and what is
private to torch."""


class PackedWeight(Tensor):
    """Made by `of`. It cannot be written into: `layer.weight = ...` packs another one."""

    unpack: Callable[[], Tensor]
    _is_param = True  # for `isinstance(weight, nn.Parameter)`

    @staticmethod
    def of(
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, unpack: Callable[[], Tensor]
    ) -> PackedWeight:
        """The weight that `unpack` makes, in this form."""
        weight: PackedWeight = without_memory(PackedWeight, shape, dtype, device)
        weight.unpack = unpack
        return weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, and copied, it is the dense parameter."""
        return nn.Parameter(self.unpack(), requires_grad=False).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return nn.Parameter(self.unpack(), requires_grad=False)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # of a property
            name = func.__self__.__name__ + name.removeprefix("__get__")
        if name == "data":
            return args[0]
        if _is_of_the_form(name.removesuffix("__set__")):
            return super().__torch_function__(func, types, args, kwargs or {})
        writes = name.endswith("__set__") or _is_in_place(name)
        given = (*args[:1], *(kwargs or {}).values())
        if (writes and any(isinstance(each, cls) for each in given)) or isinstance((kwargs or {}).get("out"), cls):
            raise TypeError(
                f"{name} of the weight of a deployed layer, which is packed for a kernel: assign another one "
                "(layer.weight = ...), load a state dict, or change the model that was deployed"
            )
        dense = tree_map_only(cls, lambda each: each.unpack(), (args, dict(kwargs or {})))
        return func(*dense[0], **dense[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda each: each.unpack(), (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _is_of_the_form(name: str) -> bool:
    private = name.startswith("_") and not name.startswith("__")
    return name in _FORM or private or (name.startswith("is_") and name not in ("is_nonzero", "is_set_to"))


def _is_in_place(name: str) -> bool:
    """By torch's way to name methods: `add_`, `__iadd__`, `__setitem__`."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__int__", "__index__"))
    return name.endswith("_")


def bytes_held(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that lie in memory, each once: not of weights that are packed."""
    tensors = [each for each in (*model.parameters(), *model.buffers()) if not isinstance(each, PackedWeight)]
    return sum({each.data_ptr(): each.nbytes for each in tensors}.values())
