"""How a weight of any module becomes sparse without the module knowing.

`Masked` is a torch parametrization: reading `module.weight` gives the masked weight, also where a module reads the
weight without calling `forward` (attention's out_proj, the encoder layer's fast path). Two state-dict hooks keep
the dense names in checkpoints. Kept apart from `torch.nn.utils.parametrize`:

- one shared class per (original class, tensor names), see `openwork.training.shared_class`;
- our own removal: torch's deletes the property from the class, which breaks copies that share it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from openwork import kernels
from openwork.methods import Method, steps_of_a_mask, stores_mask
from openwork.nm.groups import Axis
from openwork.nm.pattern import Pattern
from openwork.ops import foreach_mask, foreach_transposable_mask
from openwork.training.dtensor import by_groups, elementwise, is_sharded, placed_like, whole
from openwork.training.forward_cache import ForwardCache
from openwork.training.shared_class import AGE, plain_class, shared_class
from openwork.utils.names import join

_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
_ORIGINAL = re.compile(r"\bparametrizations\.([^.]+)\.original$")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


class Masked(nn.Module):
    """The parametrization of one weight: dense weight in, weight of the forward pass out, same shape.

    `seen_dtype` is the dtype in which the forward pass saw the weight (FSDP2 may hand it in bfloat16). The mask
    is a function of the weight rounded to it, so that the optimizer hook and `verify` find the same mask.
    `reuses_mask`: the optimizer step takes the mask of the forward. Not of a sharded weight: each process ranks its
    part once more, instead of holding the masks of all layers. `output_axis`: the mask is N:M along that one too.
    `age`: optimizer steps since a stored mask was chosen.
    """

    mask: Tensor | None

    def __init__(
        self,
        pattern: Pattern,
        axis: Axis,
        method: Method,
        cache: ForwardCache,
        weight: Tensor,
        output_axis: Axis | None = None,
    ):
        super().__init__()
        self.pattern, self.axis, self.method, self.cache, self.output_axis = pattern, axis, method, cache, output_axis
        self.seen_dtype = weight.dtype
        self.reuses_mask = hasattr(method, "gradient_term") and not stores_mask(method)
        self.age = 0
        self.register_buffer("mask", None)
        if stores_mask(method):
            self.choose_mask(weight)

    def choose_mask(self, weight: Tensor) -> None:
        """Store the mask that `weight` has now (for methods that store one)."""
        self.mask, self.age = self.ranked(weight.detach()).contiguous(), 0

    @property
    def refreshed(self) -> bool:
        """Whether a mask is stored and chosen anew during training."""
        return self.mask is not None and steps_of_a_mask(self.method) > 0

    @torch.no_grad()
    def count_step(self, weight: Tensor) -> None:
        """An optimizer step is done: a stored mask that has served its time is chosen anew, in place, so that compiled
        graphs find it. Weights that are spread over processes are gathered for it."""
        if self.mask is None or not self.refreshed:
            return
        self.age += 1
        if self.age >= steps_of_a_mask(self.method):
            self.mask.copy_(placed_like(self._rank(whole(weight.detach())), self.mask))
            self.age = 0

    def keep(self, weight: Tensor) -> Tensor:
        """The mask: bool, the shape of `weight`."""
        if self.mask is not None:
            return placed_like(self.mask, weight)
        return self.ranked(weight.detach().to(self.seen_dtype))

    def effective(self, weight: Tensor) -> Tensor:
        """The weight that the layer multiplies with, computed afresh."""
        if not self.method.sparse:
            return weight
        if hasattr(self.method, "forward_in_one_pass") and self.ranks_in_one_pass(weight):
            pruned: Tensor = self.method.forward_in_one_pass(weight, self.pattern, self.axis)
            return pruned
        keep = self.keep(weight)
        if self.reuses_mask:
            self.cache.remember(self, weight, keep)
        return elementwise(self.method.forward, weight, keep)

    def add_gradient_term(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Add to the weight's gradient what the method adds, in place, times `scale` where the gradient is scaled."""
        gradient: Any = weight.grad
        if scale is None and self.adds_in_one_pass(weight):
            self.method.add_term_in_one_pass(gradient, weight, self.pattern, self.axis)  # type: ignore[attr-defined]
        else:
            term = self.gradient_term(weight)
            gradient.add_(term if scale is None else term.mul_(scale.to(term.device)))

    def adds_in_one_pass(self, weight: Tensor) -> bool:
        """Whether a kernel adds the term to the weight's gradient without making the mask."""
        gradient: Any = weight.grad
        simple = gradient.dtype == weight.dtype and hasattr(self.method, "add_term_in_one_pass")
        return simple and self.ranks_in_one_pass(weight) and kernels.fuses(gradient)

    def ranks_in_one_pass(self, weight: Tensor) -> bool:
        """Whether a kernel finds the mask of the forward on the way: it is not stored, and seen in the weight's
        dtype."""
        return self.mask is None and self.seen_dtype == weight.dtype and kernels.fuses(weight)

    def gradient_term(self, weight: Tensor) -> Tensor:
        """What the method adds to the gradient, for the mask that the forward pass used."""
        keep = self.cache.recall(self, weight)
        term: Any = self.method.gradient_term  # type: ignore[attr-defined]
        return elementwise(term, weight, self.keep(weight) if keep is None else keep)

    def forward(self, weight: Tensor) -> Tensor:
        if self.seen_dtype != weight.dtype:
            self.seen_dtype = weight.dtype
        return self.cache.once(self, weight, self.effective)

    def extra_repr(self) -> str:
        return f"{self.pattern}, {self.method}, {self.axis}" + (
            f", output_axis {self.output_axis}" if self.output_axis else ""
        )

    def ranked(self, weight: Tensor) -> Tensor:
        """The mask that `weight` has by the method's score."""
        if self.output_axis:
            return placed_like(self._rank(whole(weight)), weight)
        return by_groups(self._rank, weight, self.axis, self.pattern.m)

    def _rank(self, weight: Tensor) -> Tensor:
        score = self.method.score(weight)
        if self.output_axis:
            return foreach_transposable_mask([score], self.pattern, [self.axis], [self.output_axis])[0]
        return foreach_mask([score], self.pattern, [self.axis])[0]


def mask_weights(module: nn.Module, masked: dict[str, Masked]) -> None:
    """Register `masked[tensor name]` on tensors of one module, in place. It must carry no parametrization yet."""
    order = tuple(module._parameters)
    original_class: Any = type(module)
    for name, parametrization in masked.items():
        parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    module.__class__ = shared_class(original_class, tuple(masked))
    module.__dict__.pop("_flat_weights", None)  # the shared class of an RNN has it as a property
    hooks = (
        module.register_state_dict_post_hook(_to_dense_names),
        module.register_load_state_dict_pre_hook(_from_dense_names),
        module.register_load_state_dict_post_hook(_report_dense_names),
    )
    module.__dict__["_openwork"] = (order, hooks)


def unmask_weights(module: nn.Module) -> None:
    """Undo `mask_weights`, in place: each weight keeps what the forward pass used, in the same Parameter."""
    parametrizations: Any = module.parametrizations
    with torch.no_grad():
        for name, masked, weight in masked_weights(module):
            used = masked.effective(weight)
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
    lists: Any = module._modules.get("parametrizations")
    if lists is None or "_openwork" not in module.__dict__:
        return []
    return [(name, each[0], each.original) for name, each in lists.items()]


def masked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (name, module) of every module in `model` that holds masked weights."""
    for name, module in model.named_modules():
        if "_openwork" in module.__dict__:
            yield plain_name(name), module


class SparseWeight(NamedTuple):
    """One masked weight of a model: its name in the plain model, where it is, what masks it, the dense weight."""

    name: str
    module: nn.Module
    tensor_name: str
    masked: Masked
    weight: nn.Parameter


def sparse_weights(model: nn.Module) -> Iterator[SparseWeight]:
    """Every masked weight in `model`, in the order of its modules."""
    for name, module in masked_modules(model):
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
    """The user's model inside DDP, `torch.compile`, `AveragedModel`: wrappers have it as their only child."""
    while isinstance(model, _WRAPPERS) or "_orig_mod" in model._modules:
        model = next(model.children())
    return model


def _renamed(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Pairs (name inside the parametrized module, name in a checkpoint)."""
    for name, masked, _ in masked_weights(module):
        yield f"{prefix}parametrizations.{name}.original", prefix + name
        if masked.mask is not None:
            yield f"{prefix}parametrizations.{name}.0.mask", f"{prefix}{name}_mask"


def _to_dense_names(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for inside, outside in _renamed(module, prefix):
        if inside in state:
            state[outside] = state.pop(inside)
    for name, masked, _weight in masked_weights(module):
        if masked.refreshed:
            state[f"{prefix}{name}{AGE}"] = torch.tensor(masked.age)
    order = [prefix + name for name in module.__dict__["_openwork"][0]]
    rest = [name for name in state if name.startswith(prefix) and name not in order]
    for name in [name for name in order if name in state] + rest:
        state[name] = state.pop(name)


def _from_dense_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, masked, _weight in masked_weights(module):
        if masked.mask is not None and prefix + name in state and f"{prefix}{name}_mask" not in state:
            kind = "fixed" if masked.method.fixed else "stored"
            warnings.warn(f"the checkpoint is dense: {kind} masks were chosen anew, from its weights", stacklevel=2)
            state[f"{prefix}{name}_mask"] = masked.ranked(state[prefix + name])
            masked.age = 0
        if (age := state.pop(f"{prefix}{name}{AGE}", None)) is not None:
            masked.age = int(age)
    for inside, outside in _renamed(module, prefix):
        if outside in state:
            state[inside] = state.pop(outside)
    for name, _masked, weight in masked_weights(module):  # `set_model_state_dict` spreads tensors whose names it knows
        inside = f"{prefix}parametrizations.{name}.original"
        if is_sharded(weight) and inside in state and not is_sharded(state[inside]):
            state[inside] = placed_like(state[inside], weight)


def _report_dense_names(_: nn.Module, incompatible: Any) -> None:
    for names in incompatible:
        names[:] = [_ORIGINAL.sub(r"\1", name) for name in names]
