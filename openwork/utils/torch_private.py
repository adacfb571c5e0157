"""What torch has no public name for, in one place, each with what happens where a version of torch lacks it.

Trees and dispatch modes (`torch.utils._pytree`, `_python_dispatch`) have been there since torch 2.0, are what torch's
own documentation uses, and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

Function = TypeVar("Function", bound=Callable[..., Any])

_is_wrapped: Callable[[Tensor], bool] | None = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None
)

_are_active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)


def is_transformed(tensor: Tensor) -> bool:
    """Whether `torch.func` (vmap, grad, jvp) put this tensor in the place of another. True where torch cannot say: the
    callers then do what is right for every tensor, slower. Since torch 2.0."""
    return True if _is_wrapped is None else _is_wrapped(tensor)


def transforms() -> bool:
    """Whether a transform of `torch.func` runs. True where torch cannot say, as above. Since torch 2.0."""
    return True if _are_active is None else _are_active()


def without_memory(subclass: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass, which has a shape and no numbers; the subclass answers for them. Since torch 1.11, and
    what torch's own notes on subclasses build on."""
    return Tensor._make_wrapper_subclass(subclass, shape, dtype=dtype, device=device, requires_grad=False)


def constant_when_compiled(function: Function) -> Function:
    """Lets compiled code take what the function returns as a constant. `torch.compiler.assume_constant_result` does
    the same, and imports the compiler, which takes seconds. A torch that does not read the mark traces the function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def aot_inductor() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Torch's functions that compile an exported program into a package, and load one. Since torch 2.6; raises
    RuntimeError without them."""
    try:
        from torch._inductor import aoti_compile_and_package, aoti_load_package
    except ImportError as error:
        raise RuntimeError(f"torch {torch.__version__} does not write packages of AOTInductor ({error})") from error
    return aoti_compile_and_package, aoti_load_package


def decompositions(operators: Sequence[Any]) -> Mapping[Any, Callable[..., Any]]:
    """What each operator is made of, for `ExportedProgram.run_decompositions`. Since torch 2.0."""
    from torch._decomp import get_decompositions

    return get_decompositions(operators)


def without_modes() -> AbstractContextManager[Any]:
    """Tensors are ordinary ones inside, also while a compiler traces with tensors that hold nothing. Since torch 2.0;
    without it, what is tried while a compiler traces fails, and is tried again later."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return nullcontext()
    return _disable_current_modes()


def freezing() -> AbstractContextManager[Any]:
    """Weights are constants of what `torch.compile` compiles inside, which dense matmuls have laid out ahead of time.
    Since torch 2.1; raises RuntimeError without it."""
    try:
        import torch._inductor.config as inductor

        return inductor.patch(freezing=True)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"torch {torch.__version__} does not freeze weights ({error})") from error


def as_functions_of_tensors() -> AbstractContextManager[Any]:
    """Functions take subclasses of Tensor inside as they take tensors. Since torch 1.13."""
    return torch._C.DisableTorchFunctionSubclass()


def is_traced() -> bool:
    """Whether `torch.jit.trace` records what runs now. Since torch 1.0."""
    return torch._C._get_tracing_state() is not None


@contextmanager
def untraced() -> Iterator[None]:
    """`torch.jit.trace` takes what is computed inside as a constant. Since torch 1.0."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both lie in one storage, also where it holds nothing (the meta device). False where one has none. Of a
    DTensor it is this process's part that counts."""
    a, b = (getattr(each, "_local_tensor", each) for each in (a, b))
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return False


def is_weight_norm(parametrization: object) -> bool:
    """Whether it is what `torch.nn.utils.parametrizations.weight_norm` registers. Since torch 2.0; without it, weights
    that are normalized are left alone, as those of any other parametrization."""
    from torch.nn.utils import parametrizations

    kind = getattr(parametrizations, "_WeightNorm", None)
    return kind is not None and isinstance(parametrization, kind)
