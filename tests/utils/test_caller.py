"""Warnings point at the line of the user."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.utils import caller

PACKAGE = Path(ow.__file__).parent


def test_every_warning_points_out_of_the_package():
    """A number as `stacklevel` is right for one way to get there."""
    fixed = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                level = [ast.unparse(each.value) for each in node.keywords if each.arg == "stacklevel"]
                if level not in (["outside()"], ["caller.outside()"]):
                    fixed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert fixed == []


@pytest.mark.parametrize("verb", [ow.verify, ow.plan, ow.deploy])
def test_the_warning_of_an_inferred_pattern_points_here(verb):
    model = nn.Sequential(nn.Linear(8, 8))
    ow.project(model, "2:4")
    with pytest.warns(UserWarning, match=r"no pattern was given: .* \(2:4 for 1 weight\)$") as caught:
        verb(model, torch.randn(1, 8), **({"engine_seconds": 0} if verb is ow.deploy else {}))
    assert {each.filename for each in caught} == {__file__}


def test_frames_of_context_managers_are_no_caller(monkeypatch):
    monkeypatch.setattr(caller, "_INSIDE", (*caller._INSIDE, __file__))
    found = []

    @contextmanager
    def within():
        found.append(caller.outside())
        yield

    def entered():
        with within():
            pass

    entered()
    alone = caller.outside()
    assert found == [alone + 3]  # entered, contextlib's __enter__, within
