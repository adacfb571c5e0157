"""torch.export and AOTInductor: a model as a program, which needs its Python code no more."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from openwork.export.outputs import check_equal, folded, outputs
from openwork.inference.layers import without_dense_weights
from openwork.utils.atomic import atomic_file
from openwork.utils.example import arguments, quiet
from openwork.utils.torch_private import aot_inductor, tree_leaves

_SUFFIX = ".part.pt2"  # both loaders look at the suffix


def to_torch_export(
    model: nn.Module, example: Any, path: str | os.PathLike[str], *, dynamic_shapes: Any = None
) -> float:
    """Write a model as a program of torch.export, which `torch.export.load(path).module()` runs; returns the largest
    difference of its outputs to the model's, as a share of the largest output.

    A model that is still sparsified is exported as finalized. `example` and `dynamic_shapes` as in `to_onnx`. A process
    that loads a deployed model imports openwork first, which knows its operators. Raises RuntimeError for other
    outputs, and what torch.export raises.
    """
    plain, _ = folded(model)
    with atomic_file(path, _SUFFIX) as part:
        torch.export.save(_anonymous(_traced(plain, example, dynamic_shapes)), part)
        return _difference(plain, example, torch.export.load(part).module())


def to_aot_inductor(
    model: nn.Module, example: Any, path: str | os.PathLike[str], *, dynamic_shapes: Any = None
) -> float:
    """Write a model compiled for this kind of hardware, which `torch._inductor.aoti_load_package(path)` runs without
    compiling anything; the rest as in `to_torch_export`. Needs a C++ compiler, here but not where it is loaded.
    """
    plain, _ = folded(model)
    compile_package, load_package = aot_inductor()
    with atomic_file(path, _SUFFIX) as part:
        with torch.no_grad():
            compile_package(_traced(plain, example, dynamic_shapes), package_path=os.fspath(part))
        return _difference(plain, example, load_package(os.fspath(part)))


def _traced(model: nn.Module, example: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    args, kwargs = arguments(model, example)
    with quiet(model), without_dense_weights(model):
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)


def _anonymous(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without the example, and without the path and line of the user's code at every node: both would be saved."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def _difference(model: nn.Module, example: Any, loaded: Any) -> float:
    args, kwargs = arguments(model, example)
    with torch.no_grad():
        results = [output for output in tree_leaves(loaded(*args, **kwargs)) if isinstance(output, torch.Tensor)]
    return check_equal("the exported program", results, outputs(model, example))
