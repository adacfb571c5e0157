"""Dotted names of modules and weights."""

from __future__ import annotations


def join(*parts: str) -> str:
    """A dotted name; parts that are empty, as the name of the root is, leave no dot.

    >>> join("", "fc", "weight"), join("layers.0", "weight")
    ('fc.weight', 'layers.0.weight')
    """
    return ".".join(part for part in parts if part)
