"""The trained networks in models/ are what their cards say."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

import openwork as ow

pytest.importorskip("lightning")
from openwork.recipes.trained import load_run, read_run, scores

MODELS = Path(__file__).parent.parent / "models"
FOLDERS = sorted(path.parent for path in MODELS.glob("*/model.safetensors"))
DATA = os.environ.get("OPENWORK_DATA")


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_all_of_them_are_small():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert FOLDERS
    assert sum(path.stat().st_size for path in files) <= 12e6
    listed = set(re.findall(r"\]\((\S+?)/README\.md\)", (MODELS / "README.md").read_text(encoding="utf-8")))
    assert listed == {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_network_is_there_without_its_data_and_sparse(folder):
    pattern = re.search(r"-(\d+)of(\d+)$", folder.name)
    net, example, config, _ = load_run(folder)
    assert config.pattern == f"{pattern[1]}:{pattern[2]}"
    assert config.data.endswith("=DIR")
    assert ow.verify(net, example, pattern=ow.Selection(config.pattern, remainder=config.remainder)).sparse
    assert f"{(folder / 'model.safetensors').stat().st_size / 1e6:.2f} MB" in card(folder)
    assert ow.load_state_dict(folder / "model.safetensors").keys() == net.state_dict().keys()


@pytest.mark.skipif(not DATA, reason="OPENWORK_DATA, the folder of test data, is not set")
def test_a_network_scores_what_its_card_says():
    folder = MODELS / "classification-2of4"
    task, config = read_run(folder)
    config = replace(config, data=f"fashion-mnist={Path(DATA) / 'fashion-mnist'}")
    score = scores(task, config, load_run(folder).net, task.load_data(config))["val_accuracy"]
    assert re.search(r"of this file \| ([\d.]+)", card(folder))[1] == f"{100 * score:.2f}"
