"""What all tests share: one thread, fixed seeds, the data folder, and `plain_loop` to compare with."""

import json
import os
import platform
import random
import sys
from importlib.metadata import version
from pathlib import Path

import numpy
import pytest
import torch

import openwork as ow
from openwork.kernels.cpu import native
from openwork.utils.torchvision_compat import prepare_torchvision

# pytest's importlib mode leaves the tests' folder out; processes that tests start inherit it.
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)
os.environ["OPENWORK_NO_ENGINES"] = "1"  # `deploy` would start a process each time; what tests it deletes this
prepare_torchvision()  # transformers, lightning and timm import it in many tests


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """torch counts what all tests of a process compile against its limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def openwork_data():
    """The folder with the data sets."""
    folder = os.environ.get("OPENWORK_DATA")
    if not folder:
        pytest.skip("needs data sets: set OPENWORK_DATA to their folder")
    return Path(folder)


# --- kernels -------------------------------------------------------------------------------------------------------

KERNELS = ow.kernels.status()


@pytest.fixture(params=KERNELS.available or [pytest.param(None, marks=pytest.mark.skip(reason=str(KERNELS)))])
def isa(request):
    """The name of the instruction set that kernels use during the test: every one of this machine."""
    yield ow.kernels.use_isa(request.param)
    ow.kernels.use_isa(KERNELS.isa)


@pytest.fixture
def no_library(monkeypatch):
    """As where the library was not built."""
    monkeypatch.setattr(native, "_open", lambda: (None, "a test hides it"))


# --- docs/works-with.md ------------------------------------------------------------------------------------------


@pytest.fixture
def row(request):
    """`row(group, what, **facts)` makes a line of docs/works-with.md, where the test passes.

    Facts: `difference` from the equations by net, `tolerance`, `resumes`, `error` that the user gets, `note`,
    `packages` whose versions matter.
    """
    test = request.node.nodeid.partition("[")[0]

    def add(group, what, **facts):
        request.node.user_properties.append(("works-with", {"group": group, "what": what, "test": test, **facts}))

    return add


def pytest_collection_modifyitems(items):
    for item in items:
        if "row" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.works_with)
        if item.get_closest_marker("for_the_page") and "OPENWORK_WORKS_WITH" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="takes long, and others test much of it: make works-with runs it"))


class Rows:
    """Writes the rows of all tests that passed into a file."""

    def __init__(self, file):
        self.file, self.rows, self.left_out = Path(file), [], []

    def pytest_runtest_logreport(self, report):
        found = [value for key, value in report.user_properties if key == "works-with"]
        if report.when == "call" and report.passed:
            self.rows += found
        elif not report.passed:
            self.left_out.append(f"{report.outcome}: {report.nodeid}")

    def pytest_sessionfinish(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        found = {"rows": self.rows, "left out": self.left_out, "packages": _versions(self.rows), "machine": _machine()}
        self.file.write_text(json.dumps(found, indent=1))


def _versions(rows):
    """Of the packages that matter to some row."""
    packages = {"numpy", "torch", *(name for each in rows for name in each.get("packages", ()))}
    return [f"{name} {version(name)}" for name in sorted(packages)]


def _machine():
    info = Path("/proc/cpuinfo")
    names = [each for each in info.read_text().splitlines() if each.startswith("model name")] if info.exists() else []
    processor = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return f"Python {platform.python_version()}, on {os.cpu_count()} cores of {processor}"


def pytest_configure(config):
    file = os.environ.get("OPENWORK_WORKS_WITH")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows(file))
