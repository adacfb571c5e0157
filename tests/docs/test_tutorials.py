"""The notebooks of docs/tutorials run from top to bottom, shortened, and hold the outputs of a full run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for needed in ("matplotlib", "sklearn", "transformers", "onnxruntime", "onnxscript"):
        if f"{needed}" in path.read_text(encoding="utf-8"):
            pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENWORK_SHORT", "1")
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    stored = json.loads(path.read_text(encoding="utf-8"))
    run = loaded(DOCS / "_site" / "run_notebooks.py").run(path)
    for cell, as_stored in zip(run["cells"], stored["cells"], strict=True):
        kinds = [[sorted(each.get("data", {"text": 0})) for each in c.get("outputs", ())] for c in (cell, as_stored)]
        assert kinds[0] == kinds[1], f"make tutorials: cell {cell['id']} has other outputs than are stored"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_small_outputs_and_no_paths(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell["outputs"]):
        text = json.dumps(output)
        assert len(text) < 100_000
        assert "/tmp/" not in text
        assert "/home/" not in text
