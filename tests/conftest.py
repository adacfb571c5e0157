"""What all tests share: one thread, fixed seeds, the data folder, and `plain_loop` to compare with."""

import os
import random
import sys
from pathlib import Path

import numpy
import pytest
import torch

# pytest's importlib mode leaves the tests' folder out; processes that tests start inherit it.
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def openwork_data():
    """The folder with the data sets."""
    folder = os.environ.get("OPENWORK_DATA")
    if not folder:
        pytest.skip("needs data sets: set OPENWORK_DATA to their folder")
    return Path(folder)
