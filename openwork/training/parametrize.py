"""How a weight of any module becomes sparse without the module knowing.

`Masked` is a torch parametrization: reading `module.weight` gives the masked weight, also where a module reads the
weight without calling `forward` (attention's out_proj, the encoder layer's fast path). Two state-dict hooks keep
the dense names in checkpoints. Kept apart from `torch.nn.utils.parametrize`:

- one shared class per (original class, tensor names), see `openwork.training.shared_class`;
- our own removal: torch's deletes the property from the class, which breaks copies that share it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from openwork.nm.masks import too_dense
from openwork.nm.pattern import Pattern
from openwork.training.dtensor import full_tensor, is_sharded, placed_like
from openwork.training.masked import Masked
from openwork.training.shared_class import plain_class, shared_class
from openwork.utils import caller
from openwork.utils.counted import counted
from openwork.utils.names import join

_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
_ORIGINAL = re.compile(r"\bparametrizations\.([^.]+)\.original$")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def mask_weights(module: nn.Module, masked: dict[str, Masked]) -> None:
    """Register `masked[tensor name]` on tensors of one module, in place. It must carry no parametrization yet."""
    order = tuple(module._parameters)
    original_class: Any = type(module)
    for name, parametrization in masked.items():
        parametrize.register_parametrization(module, name, parametrization, unsafe=True)
        parametrizations: Any = module.parametrizations
        parametrizations[name].__class__ = MaskedSteps
    module.__class__ = shared_class(original_class, tuple(masked))
    module.__dict__.pop("_flat_weights", None)  # the shared class of an RNN has it as a property
    hooks = (
        module.register_state_dict_post_hook(_to_dense_names),
        module.register_load_state_dict_pre_hook(_from_dense_names),
        module.register_load_state_dict_post_hook(_report_dense_names),
    )
    module.__dict__["_openwork"] = (order, hooks)


class MaskedSteps(parametrize.ParametrizationList):
    """The mask of a weight, and what others register on top of it."""

    __module__ = parametrize.ParametrizationList.__module__  # torch.fx calls torch's own modules as they are

    def append(self, module: nn.Module) -> MaskedSteps:
        wanted = [
            each
            for each in inspect.signature(module.forward).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) and each.default is each.empty
        ]
        if len(wanted) != 1:
            raise RuntimeError(
                f"{type(module).__name__} makes a weight of {counted(len(wanted), 'tensor')}, and a sparsified layer "
                "has one: register it before ow.sparsify, which "
                "masks the direction of weight_norm and leaves others alone"
            )
        super().append(module)
        return self

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        masked: Any = self[0]
        masked.follow_average(self.original)
        return _empty_steps, (), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        masked: Any = self[0]
        masked.belongs_to(self.original)  # torch's versions begin at 0 in a copy, at 1 from a file


def _empty_steps() -> nn.Module:
    return MaskedSteps.__new__(MaskedSteps)


def unmask_weights(module: nn.Module) -> None:
    """Undo `mask_weights`, in place: each weight keeps what the method folds it to, in the same Parameter."""
    parametrizations: Any = module.parametrizations
    with torch.no_grad():
        for name, masked, weight in masked_weights(module):
            used = masked.fold(weight)
            for later in list(parametrizations[name])[1:]:  # what others registered on top of it
                used = later(used)
            weight.copy_(used)
            module._parameters[name] = weight
    order, hooks = module.__dict__.pop("_openwork")
    for hook in hooks:
        hook.remove()
    del module.parametrizations
    module.__class__ = plain_class(module)
    rest = [name for name in module._parameters if name not in order]
    for name in [name for name in order if name in module._parameters] + rest:
        module._parameters[name] = module._parameters.pop(name)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def masked_weights(module: nn.Module) -> list[tuple[str, Masked, nn.Parameter]]:
    """The (tensor name, Masked, dense weight) of one module; none for a module that `mask_weights` left alone."""
    parametrizations: Any = module._modules.get("parametrizations")
    if parametrizations is None or "_openwork" not in module.__dict__:
        return []
    return [(name, steps[0], steps.original) for name, steps in parametrizations.items()]


def masked_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The (name, module) of every module in `model` that holds masked weights, once or under `every_name`."""
    for name, module in model.named_modules(remove_duplicate=not every_name):
        if "_openwork" in module.__dict__:
            yield plain_name(name), module


class SparseWeight(NamedTuple):
    """One masked weight of a model: its name in the plain model, where it is, what masks it, the dense weight."""

    name: str
    module: nn.Module
    tensor_name: str
    masked: Masked
    weight: nn.Parameter


def sparse_weights(model: nn.Module, *, every_name: bool = False) -> Iterator[SparseWeight]:
    """Every masked weight in `model`, in the order of its modules: once, or under `every_name` that it has."""
    for name, module in masked_modules(model, every_name=every_name):
        yield from sparse_weights_of(name, module)


def sparse_weights_of(name: str, module: nn.Module) -> Iterator[SparseWeight]:
    """Those of one module, which has this name in the plain model."""
    for tensor_name, masked, weight in masked_weights(module):
        yield SparseWeight(join(name, tensor_name), module, tensor_name, masked, weight)


def trained_weights(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[SparseWeight]:
    """The masked weights that `optimizer` updates. Looked up anew each time: wrappers replace parameters."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [sparse for sparse in sparse_weights(model) if id(sparse.weight) in trained]


def plain_name(name: str) -> str:
    """A module's name without what activation checkpointing, `torch.compile` and FSDP put in.

    >>> plain_name("layers.0._checkpoint_wrapped_module.fc")
    'layers.0.fc'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def weight_name(name: str) -> str:
    """A parameter's name in the plain model.

    >>> weight_name("fc.parametrizations.weight.original")
    'fc.weight'
    """
    return _ORIGINAL.sub(r"\1", plain_name(name))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside DDP, `torch.compile`, `AveragedModel`: wrappers have it as their only child. Raises
    TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"found {what} where the model is needed, a torch.nn.Module")
    while isinstance(model, _WRAPPERS) or "_orig_mod" in model._modules:
        model = next(model.children())
    return model


def _renamed(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Pairs (name inside the parametrized module, name in a checkpoint)."""
    for name, masked, _ in masked_weights(module):
        yield f"{prefix}parametrizations.{name}.original", prefix + name
        for key, buffer in masked.buffers_saved.items():
            yield f"{prefix}parametrizations.{name}.0.{buffer}", f"{prefix}{name}_{key}"


def _to_dense_names(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for inside, outside in _renamed(module, prefix):
        if inside in state:
            state[outside] = state.pop(inside)
    for name, masked, weight in masked_weights(module):
        masked.follow_average(weight)
        state |= {f"{prefix}{name}_{key}": tensor for key, tensor in masked.others_saved.items()}
        if masked.lost:
            state |= {f"{prefix}{name}_{key}": tensor for key, tensor in masked.state_of(weight).items()}
        if masked.lost and masked.mask is not None:
            state[f"{prefix}{name}_mask"] = masked.mask_of(weight)
    order = [prefix + name for name in module.__dict__["_openwork"][0]]
    rest = [name for name in state if name.startswith(prefix) and name not in order]
    for name in [name for name in order if name in state] + rest:
        state[name] = state.pop(name)


def _from_dense_names(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    _: object,
    errors: list[str],
) -> None:
    assigns = bool(metadata.get("assign_to_params_buffers"))
    for name, masked, weight in masked_weights(module):
        masked.cache.forget(masked)
        _take_counters(masked, state, prefix + name)
        if masked.mask is not None:
            _take_mask(masked, state, f"{prefix}{name}_mask", assigns, missing if strict else [], errors)
        if assigns and prefix + name in state and not torch.__future__.get_swap_module_params_on_conversion():
            masked.replaced = ref(weight)
            Masked.assignments += 1
    for inside, outside in _renamed(module, prefix):
        if outside in state:
            state[inside] = state.pop(outside)
    for name, _masked, weight in masked_weights(module):  # `set_model_state_dict` spreads tensors whose names it knows
        inside = f"{prefix}parametrizations.{name}.original"
        if is_sharded(weight) and inside in state and not is_sharded(state[inside]):
            state[inside] = placed_like(state[inside], weight)


def _take_mask(
    masked: Masked, state: dict[str, Any], key: str, assigns: bool, missing: list[str], errors: list[str]
) -> None:
    if key not in state:
        missing.append(key)
        return
    mask, own = state.pop(key), masked.mask
    assert own is not None
    if problem := _unfit(mask, masked):
        errors.append(f"{key}: {problem}")
    elif assigns:
        masked.mask = mask.detach().bool()
    else:
        own.copy_(placed_like(mask, own))


def _unfit(mask: Tensor, masked: Masked) -> str:
    """Why the mask of a state dict cannot be that of a weight."""
    phase, shape, needed = masked.phase, tuple(mask.shape), tuple(masked.mask.shape)  # type: ignore[union-attr]
    if shape != needed:
        return f"found shape {shape}, needed {needed}"
    checked = not mask.is_meta and not isinstance(phase.dense_groups, Tensor)
    if checked and (problem := too_dense(full_tensor(mask), phase.pattern, phase.axis)):
        return f"{problem}: call ow.change_pattern, or sparsify, at the pattern of the checkpoint first"
    return ""


def _take_counters(masked: Masked, state: dict[str, Any], name: str) -> None:
    """Take the counters of one weight out of a state dict. One that has the weight but nothing of what is kept beside
    it is dense: then training begins anew."""
    keys = [*masked.buffers_saved, *(["mask"] if masked.mask is not None else [])]
    if name in state and keys and not any(f"{name}_{key}" in state for key in keys):
        kind = "fixed" if masked.method.schedule.refresh_every is None else "stored"
        what = f"{kind} masks were chosen anew" if masked.mask is not None else "what the method keeps was made anew"
        warnings.warn(f"the checkpoint is dense: {what}, from its weights", stacklevel=caller.outside())
        state |= {f"{name}_{key}": tensor for key, tensor in masked.restart(state[name]).items()}
    masked.lost = masked.lost and any(f"{name}_{key}" not in state for key in keys)
    if (pattern := state.pop(f"{name}_pattern", None)) is not None:
        masked.change_pattern(Pattern(*pattern.tolist()), None)
    if (age := state.pop(f"{name}_mask_age", None)) is not None:
        masked.age = int(age)
    step = int(state.pop(f"{name}_step", 0))  # of a method without a running schedule it means nothing
    if name in state and masked.method.schedule.length:
        masked.go_to(step)


def _report_dense_names(module: nn.Module, incompatible: Any) -> None:
    for _, masked, weight in masked_weights(module):
        masked.belongs_to(weight)
    for names in incompatible:
        names[:] = [_ORIGINAL.sub(r"\1", name) for name in names]
