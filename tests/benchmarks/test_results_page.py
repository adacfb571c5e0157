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


def test_the_first_table_is_that_of_the_stored_results():
    for path in (results_page.PAGE, results_page.README):
        page = path.read_text(encoding="utf-8")
        assert results_page.with_overview(page, path) == page


def test_a_difference_is_bold_where_it_is_significant():
    (document,) = results_page.stored("classification", ["compare"])
    for row in document["rows"]:
        row["p"] = {"ste": 0.049, "sr-ste": 0.051}.get(row["method"])
    *_, line = results_page.overview([document]).splitlines()
    assert [cell.count("**") for cell in line.split("|")[3:-1]] == [0, 2, 0, 0]  # dense, STE, SR-STE, ASP
    means = {row["method"]: f"{100 * row['scores']['val_accuracy']:.2f} ±" for row in document["rows"]}
    assert [cell.strip()[:7] for cell in line.split("|")[3:-1]] == [means[name] for name in results_page.FOUR]


def test_what_options_were_chosen_by_is_told():
    (document,) = results_page.stored("classification", ["choose"])
    (line,) = results_page.tried(document)
    assert line.startswith("accuracy % of sr-ste 2:4: decay=-0.0002: 8")
    assert line.count("decay=") == 4


def test_a_second_comparison_adds_its_rows_and_not_the_dense_one_again():
    (document,) = results_page.stored("classification", ["compare"])
    dense, ste, *_ = document["rows"]
    parts = [document | {"rows": [dense, ste]}, document | {"rows": [dense, ste | {"pattern": "1:8"}]}]
    lines = [line for line in results_page.section(parts).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert [line.split(" | ")[1] for line in lines[2:]] == ["-", "2:4", "1:8"]


@pytest.mark.parametrize("path", WEIGHT_DTYPES, ids=lambda path: path.stem)
def test_no_folder_of_a_machine_is_kept(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert results_page.without_folders(document) == document
