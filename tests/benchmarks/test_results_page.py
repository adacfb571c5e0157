"""docs/results.md holds the tables that benchmarks/results_page.py makes of the stored results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import results_page  # noqa: E402

WEIGHT_DTYPES = sorted(results_page.RESULTS.glob("*.json"))


def test_tables_are_made_not_typed():
    page = results_page.PAGE.read_text(encoding="utf-8")
    assert results_page.with_tables(page) == page
    assert page.count("<!-- results ") == page.count("<!-- end -->") >= 4


def test_a_second_comparison_adds_its_rows_and_not_the_dense_one_again():
    document = json.loads((results_page.RESULTS / "flow.json").read_text())
    dense, ste, *_ = document["rows"]
    parts = [document | {"rows": [dense, ste]}, document | {"rows": [dense, ste | {"pattern": "1:8"}]}]
    lines = [line for line in results_page.section(parts).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert [line.split(" | ")[1] for line in lines[2:]] == ["-", "2:4", "1:8"]


@pytest.mark.parametrize("path", WEIGHT_DTYPES, ids=lambda path: path.stem)
def test_no_folder_of_a_machine_is_kept(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert results_page.without_folders(document) == document
