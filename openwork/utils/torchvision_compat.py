"""torchvision that imports beside any torch, also one that its compiled operators do not load with.

A torchvision wheel built for CUDA beside a CPU-only torch cannot load its `_C` library, and then `import torchvision`,
and with it Lightning, timm and much of transformers, ends with "operator torchvision::nms does not exist": torchvision
registers fake kernels for operators that nobody defined. `prepare_torchvision` defines them, in plain torch
(`torchvision_ops.py`), and does not import torchvision itself. The packages of openwork whose modules import any of
those call it first: `openwork.integrations`, `openwork.recipes`.

The cure is a torchvision from the index that torch came from. Of the compiled operators `nms` and `roi_align` are what
torchvision's detectors need; `roi_pool`, `ps_roi_*`, `deform_conv2d` and `torchvision.io.decode_image` stay missing,
and say so when called.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from openwork.utils.torchvision_ops import SCHEMAS, nms, roi_align


def prepare_torchvision() -> None:
    """Make `import torchvision` work where its own operators do not load; otherwise change nothing.

    Does nothing where torchvision is not installed. Call it before the first import of torchvision, or after one that
    failed.
    """
    if "torchvision" in sys.modules:
        return
    _forget_failed_import()
    spec = importlib.util.find_spec("torchvision")
    if spec is not None and spec.origin is not None and not _own_operators_load(Path(spec.origin).parent):
        _define_operators()


def ensure_torchvision() -> ModuleType:
    """The torchvision module, imported and with `nms` and `roi_align` in working order.

    Raises ImportError where torchvision is not installed.
    """
    prepare_torchvision()
    try:
        torchvision = importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError("torchvision is missing, and this task needs it: pip install 'openwork[train]'") from error
    if not torchvision.extension._has_ops():
        _announce_operators()
    return torchvision


def _forget_failed_import() -> None:
    """Remove what a failed import left: Python drops the package but keeps its submodules, detached from it."""
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def _own_operators_load(folder: Path) -> bool:
    """Whether torchvision's compiled library loads, which torchvision itself does on import."""
    try:
        for library in folder.glob("_C*"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


@functools.cache  # a process can define an operator once; and the definition lives as long as this object
def _define_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    library.impl("nms", nms, "CompositeExplicitAutograd")
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    return library


def _announce_operators() -> None:
    """Tell torchvision that its operators are there; else it refuses nms and compiles its own slower roi_align.

    `_has_ops` is private; torchvision 0.28 asks it.
    """
    # By importlib, since `torchvision.ops.roi_align` as an attribute is the function of that name.
    for name in ("torchvision.extension", "torchvision.ops.roi_align"):
        module: Any = importlib.import_module(name)
        if not hasattr(module, "_has_ops"):
            raise RuntimeError(
                f"the operators of torchvision do not load beside torch {torch.__version__}, and {name} does not say "
                "how to replace them: install the torchvision that belongs to this torch, from the same index"
            )
        setattr(module, "_has_ops", _has_ops)  # noqa: B010 - no name that type checkers know


def _has_ops() -> bool:
    return True
