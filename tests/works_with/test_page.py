"""docs/works-with.md says what tests say, all of them and no others."""

import ast
import re
from pathlib import Path

from works_with.page import line, page, run_with

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "works-with.md"


def names_of_tests():
    """Every test that takes `row`, as the page names it."""
    found = set()
    for file in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and _takes_row(node):
                place = file.relative_to(TESTS).with_suffix("").as_posix()
                found.add(f"`{place}` `{node.name}`")
    return found


def _takes_row(node):
    return "row" in {each.arg for each in node.args.args}


def test_every_line_names_a_test_and_every_such_test_has_a_line():
    assert set(re.findall(r"`[\w/]+` `test_\w+`", PAGE.read_text(encoding="utf-8"))) == names_of_tests()


def test_a_line_shows_what_was_found():
    row = {
        "group": "Loop",
        "what": "plain",
        "test": "tests/a/test_b.py::test_c",
        "difference": {"Net": 3e-8, "Other": 0.0},
    }
    row |= {"tolerance": 1e-4, "resumes": True}
    assert line(row) == "| plain | Net 3e-08; Other 0 (1e-04) | exactly | `a/test_b` `test_c` |"
    wrong = {"group": "Loop", "what": "bad", "test": "tests/a/test_b.py::test_d", "error": "ValueError: a | b"}
    text = page([row, row, wrong], "torch 1")
    assert text.count("| plain |") == 1
    assert (
        text.index("## What works") < text.index("| plain |") < text.index("## What does not") < text.index("| bad |")
    )
    assert "| bad | ValueError: a / b | `a/test_b` `test_d` |" in text


def test_several_results_make_one_list_of_versions():
    one, other = ({"packages": ["torch 1", name], "machine": "a machine"} for name in ("b 2", "a 3"))
    assert run_with([one, other]) == "a 3, b 2, torch 1; a machine"
