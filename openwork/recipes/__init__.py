"""Recipes: the paper's tasks, each trained, compared and reported by one command. Nothing in openwork imports them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from openwork.utils.torchvision_compat import prepare_torchvision

if TYPE_CHECKING:
    from openwork.recipes.task import Task

prepare_torchvision()  # Lightning, timm and transformers import it

TASKS = ("classification", "detection", "flow", "language", "segmentation", "translation")


def find(name: str) -> Task:
    """The task of that name. Only its own libraries are imported."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; use one of {', '.join(TASKS)}")
    return importlib.import_module(f"openwork.recipes.{name}").TASK
