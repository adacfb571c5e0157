"""How a weight of any module becomes sparse without the module knowing.

`Masked` is a torch parametrization: reading `module.weight` gives the masked weight, also where a module reads the
weight without calling `forward` (attention's out_proj, the encoder layer's fast path). Two state-dict hooks keep
the dense names in checkpoints. Kept apart from `torch.nn.utils.parametrize`:

- one shared class per (original class, tensor names): torch makes one class per instance, which makes regional
  `torch.compile` recompile for each block;
- our own removal: torch's deletes the property from the class, which breaks copies that share it.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

from openwork import kernels
from openwork.axis import Axis
from openwork.methods import Method, steps_of_a_mask, stores_mask
from openwork.ops import keep_largest, keep_largest_list, keep_transposable
from openwork.pattern import Pattern
from openwork.sharded import by_groups, elementwise, placed_like, whole

_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
AGE = "_mask_age"
"""What follows a weight's name in a state dict: optimizer steps since its mask was chosen."""
_ORIGINAL = re.compile(r"\bparametrizations\.([^.]+)\.original$")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


class _StepClock:
    """Counts the optimizer steps of the process. Fused optimizers write weights without raising their version."""

    def __init__(self) -> None:
        self.steps = 0

    def tick(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.steps += 1


_clock = _StepClock()
register_optimizer_step_post_hook(_clock.tick)


class ForwardScope:
    """Computes each masked weight once within one forward of the root module, per grad mode.

    RAFT runs its update block 12 times in a forward, an encoder layer reads its weights 6 times. `enter` and
    `leave` are forward hooks of the root. Outside a root forward, and under `torch.compile` (which merges equal
    expressions itself), nothing is kept. Each thread has its own; copies start empty. A weight that is changed
    between two reads is computed again, but for writes into `.data`, of which torch keeps no count.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def __reduce__(self) -> tuple[type[ForwardScope], tuple[()]]:
        return ForwardScope, ()

    def remember(self, owner: object, weight: Tensor, keep: Tensor) -> None:
        """Hold the mask that a forward used until the optimizer step asks for it."""
        if not torch.compiler.is_compiling() and weight.requires_grad and torch.is_grad_enabled():
            self._masks()[id(owner)] = (ref(weight), _state(weight), keep)

    def recall(self, owner: object, weight: Tensor) -> Tensor | None:
        """The mask of the forward since which this very weight has not changed, once; None if there is none."""
        found = self._masks().pop(id(owner), None)
        return found[2] if found and found[0]() is weight and found[1] == _state(weight) else None

    def _masks(self) -> dict[int, tuple[ref[Tensor], tuple[int | None, int], Tensor]]:
        if not hasattr(self._here, "masks"):
            self._here.masks = {}
        return self._here.masks

    def enter(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._here.depth = getattr(self._here, "depth", 0) + 1
            self._here.seen = {}  # in a nested call too: what looks like a call around it may have been interrupted

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._here.depth = max(0, getattr(self._here, "depth", 0) - 1)
            if self._here.depth == 0:
                self._here.seen = {}

    def once(self, owner: object, weight: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(weight)`, or what it gave before in this forward for the very same weight."""
        if torch.compiler.is_compiling() or not getattr(self._here, "depth", 0):
            return compute(weight)
        key = (id(owner), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        version = (_state(weight), _clock.steps)
        found = self._here.seen.get(key)
        if found is None or found[0] is not weight or found[1] != version:
            found = self._here.seen[key] = (weight, version, compute(weight))
        return found[2]


def _state(weight: Tensor) -> tuple[int | None, int]:
    """What differs once a weight was changed: in place, or by `weight.data = other`, which raises no version."""
    try:
        address = weight.data_ptr()
    except RuntimeError:  # inside torch.func, where it has none
        address = 0
    return None if weight.is_inference() else weight._version, address


def change_of(weight: Tensor) -> tuple[object, ...]:
    """What stays equal as long as a weight has not changed, also for optimizers that raise no version."""
    return (*_state(weight), _clock.steps)


class Masked(nn.Module):
    """The parametrization of one weight: dense weight in, weight of the forward pass out, same shape.

    `seen_dtype` is the dtype in which the forward pass saw the weight (FSDP2 may hand it in bfloat16). The mask
    is a function of the weight rounded to it, so that the optimizer hook and `verify` find the same mask.
    `reuses_mask`: the optimizer step takes the mask of the forward. Not of a sharded weight: each process ranks its
    part once more, instead of holding the masks of all layers. `across`: the output axis, where the mask is N:M along
    that one too. `age`: optimizer steps since a stored mask was chosen.
    """

    mask: Tensor | None

    def __init__(
        self,
        pattern: Pattern,
        axis: Axis,
        method: Method,
        scope: ForwardScope,
        weight: Tensor,
        across: Axis | None = None,
    ):
        super().__init__()
        self.pattern, self.axis, self.method, self.scope, self.across = pattern, axis, method, scope, across
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
            self.scope.remember(self, weight, keep)
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
        return simple and self.ranks_in_one_pass(weight) and kernels.in_one_pass(gradient)

    def ranks_in_one_pass(self, weight: Tensor) -> bool:
        """Whether a kernel finds the mask of the forward on the way: it is not stored, and seen in the weight's
        dtype."""
        return self.mask is None and self.seen_dtype == weight.dtype and kernels.in_one_pass(weight)

    def gradient_term(self, weight: Tensor) -> Tensor:
        """What the method adds to the gradient, for the mask that the forward pass used."""
        keep = self.scope.recall(self, weight)
        term: Any = self.method.gradient_term  # type: ignore[attr-defined]
        return elementwise(term, weight, self.keep(weight) if keep is None else keep)

    def forward(self, weight: Tensor) -> Tensor:
        if self.seen_dtype != weight.dtype:
            self.seen_dtype = weight.dtype
        return self.scope.once(self, weight, self.effective)

    def extra_repr(self) -> str:
        return f"{self.pattern}, {self.method}, {self.axis}" + (f", across {self.across}" if self.across else "")

    def ranked(self, weight: Tensor) -> Tensor:
        """The mask that `weight` has by the method's score."""
        if self.across:
            return placed_like(self._rank(whole(weight)), weight)
        return by_groups(self._rank, weight, self.axis, self.pattern.m)

    def _rank(self, weight: Tensor) -> Tensor:
        score = self.method.score(weight)
        if self.across:
            return keep_transposable(score, self.pattern, self.axis, self.across)
        return keep_largest(score, self.pattern, self.axis)


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


def held_weights(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[Masked, nn.Parameter]]:
    """The masked weights that `optimizer` updates. Looked up anew each time: wrappers replace parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [
        (masked, weight)
        for _, module in masked_modules(model)
        for _, masked, weight in masked_weights(module)
        if id(weight) in held
    ]


def keep_all(held: Iterable[tuple[Masked, nn.Parameter]]) -> list[Tensor]:
    """`Masked.keep` of many weights. Those on a GPU that are ranked afresh take one launch for each pattern."""
    held = list(held)
    found: dict[int, Tensor] = {}
    ranked = {i: each for i, each in enumerate(held) if each[0].ranks_in_one_pass(each[1])}
    for pattern, indices in _in_lists(ranked, lambda masked: masked.pattern):
        scores = [held[i][0].method.score(held[i][1].detach()) for i in indices]
        found |= zip(indices, keep_largest_list(scores, pattern, [held[i][0].axis for i in indices]), strict=True)
    return [found[i] if i in found else masked.keep(weight) for i, (masked, weight) in enumerate(held)]


def add_gradient_terms(held: Iterable[tuple[Masked, nn.Parameter]], scale: Tensor | None) -> None:
    """`Masked.add_gradient_term` of many weights. On a GPU one launch adds those of one method and pattern."""
    held = [each for each in held if each[1].grad is not None and hasattr(each[0].method, "gradient_term")]
    simple = {i: each for i, each in enumerate(held) if scale is None and each[0].adds_in_one_pass(each[1])}
    simple = {i: each for i, each in simple.items() if hasattr(each[0].method, "add_terms_in_one_pass")}
    done: set[int] = set()
    for (method, pattern), indices in _in_lists(simple, lambda masked: (masked.method, masked.pattern)):
        weights = [held[i][1] for i in indices]
        gradients: Any = [weight.grad for weight in weights]
        method.add_terms_in_one_pass(gradients, weights, pattern, [held[i][0].axis for i in indices])
        done |= set(indices)
    for i, (masked, weight) in enumerate(held):
        if i not in done:
            masked.add_gradient_term(weight, scale)


def _in_lists(
    held: Mapping[int, tuple[Masked, nn.Parameter]], alike: Callable[[Masked], Any]
) -> list[tuple[Any, list[int]]]:
    """Which of the weights one launch can take together, and what they have alike."""
    lists: dict[Any, list[int]] = {}
    for i, (masked, weight) in held.items():
        if kernels.takes_lists(weight):
            lists.setdefault((weight.device, alike(masked)), []).append(i)
    return [(what, indices) for (_, what), indices in lists.items()]


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
    members |= {f"{name}_mask": _stored_mask(name) for name in names} | {f"{name}{AGE}": _age(name) for name in names}
    members |= {"register_parameter": _register_parameter, "__delattr__": _refuse_to_remove}
    members["_distribute_module_applied"] = property(_distributed, _set_distributed)
    if issubclass(original, nn.RNNBase):
        members |= {"_flat_weights": property(_fresh_weights, _ignore), "flatten_parameters": _ignore}
    return type(f"Parametrized{original.__name__}", (original,), members)


def _rebuild(original: Any, names: tuple[str, ...]) -> nn.Module:
    made = shared_class(original, names)
    return made.__new__(made)


def _read_through(name: str) -> property:
    def read(self: Any) -> Tensor:
        return self.parametrizations[name]()

    def refuse(self: nn.Module, value: object) -> None:
        raise _assigned(self, name)

    return property(read, refuse)


def _stored_mask(name: str) -> property:
    """The mask under its name in the state dict, where `torch.distributed.checkpoint.state_dict` looks for it."""

    def read(self: Any) -> Tensor:
        if (mask := self.parametrizations[name][0].mask) is None:
            raise AttributeError(name)  # nn.Module then looks for another of this name
        return mask

    return property(read)


def _age(name: str) -> property:
    def read(self: Any) -> Tensor:
        if not self.parametrizations[name][0].refreshed:
            raise AttributeError(name)
        return torch.tensor(self.parametrizations[name][0].age)

    return property(read)


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


def _report_dense_names(_: nn.Module, incompatible: Any) -> None:
    for names in incompatible:
        names[:] = [_ORIGINAL.sub(r"\1", name) for name in names]
