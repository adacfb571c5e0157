"""docs/scale.md holds the tables that benchmarks/at_scale.py makes of the presets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openwork.recipes import TASKS, find

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import at_scale  # noqa: E402


@pytest.fixture(scope="module")
def section():
    return at_scale.section()


def test_tables_are_made_not_typed(section):
    assert f"<!-- at scale -->\n{section}<!-- end at scale -->" in at_scale.PAGE.read_text(encoding="utf-8")


def test_every_preset_is_there(section):
    presets = {(name, preset) for name in TASKS for preset in find(name).config.presets}
    assert presets - set(at_scale.RUNS) == {("flow", "paper")}  # of which we know no published time: in the text
    assert all(f"| {task} `{preset}` |" in section for task, preset in at_scale.RUNS)


def test_resnet50_by_hand():
    """25,557,032 weights, as torchvision has them; of those all convolutions but the first are sparse."""
    size = at_scale.size_of("classification", "paper")
    assert size.steps == 120 * 5004  # 1,281,167 / 256
    batch_norm, last, first = 2 * 26_560, 2048 * 1000 + 1000, 64 * 3 * 7 * 7
    assert (size.all, size.sparse) == (25_557_032, 25_557_032 - batch_norm - last - first)
    assert size.dense_bytes == 12 * 25_557_032  # weights, gradients, momentum
    assert size.added_bytes == (5 * size.sparse, 4 * size.sparse)
    assert at_scale.Published("", "", samples_per_second=256).hours(3600, 256) == 1


def test_what_is_frozen_has_no_gradient():
    """The first two stages of the backbone, with torchvision's parameters of them."""
    size = at_scale.size_of("detection", "paper")
    frozen = 64 * 3 * 49 + 3 * (64 * 64 * 9 + 64 * 256) + 64 * 64 + 2 * 256 * 64 + 64 * 256
    assert size.all - size.trained == frozen
    assert size.dense_bytes == 4 * size.all + 8 * size.trained
