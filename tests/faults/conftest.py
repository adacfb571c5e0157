"""`isa` runs a test on every instruction set of this machine, `no_library` without any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import openwork as ow
from openwork.kernels.cpu import native

STATUS = ow.kernels.status()


@pytest.fixture(params=STATUS.available or [pytest.param(None, marks=pytest.mark.skip(reason=str(STATUS)))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set that kernels use during the test."""
    yield ow.kernels.use_isa(request.param)
    ow.kernels.use_isa(STATUS.isa)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the library was not built."""
    monkeypatch.setattr(native, "_open", lambda: (None, "a test hides it"))
