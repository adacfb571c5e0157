"""Whose line of code a warning is about."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def outside() -> int:
    """The `stacklevel` for a `warnings.warn` beside this call: that of the first line outside openwork and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
