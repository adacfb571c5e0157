"""The API reference: every public name on one page, documented, with an example that the doctests run."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import openwork as ow

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
# What `import openwork` is for; rooms of the package are attributes of it, too.
NAMES = re.findall(r"^from .* import \w+ as (\w+)$", inspect.getsource(ow), re.MULTILINE)


def test_every_public_name_is_on_one_page():
    named = Counter(
        name for page in PAGES.values() for name in re.findall(r"^::: openwork\.(\w+)$", page, re.MULTILINE)
    )
    assert named == Counter(NAMES)


def test_the_index_lists_what_the_pages_have():
    rows = dict(re.findall(r"^\| \[.*?\]\((\w+\.md)\) \| (.*) \|$", PAGES["index.md"], re.MULTILINE))
    assert rows.keys() == PAGES.keys() - {"index.md"}
    for name, row in rows.items():
        shown = re.findall(r"^::: openwork\.(?:.*\.)?(\w+)$", PAGES[name], re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == shown


@pytest.mark.parametrize("name", NAMES)
def test_a_public_docstring_has_an_example(name):
    text = inspect.getdoc(getattr(ow, name))
    assert re.search(r"^>>> ", text, re.MULTILINE), f"ow.{name} has no example"
    lines = len(re.findall(r"^(?:>>>|\.\.\.) ?.*$", text, re.MULTILINE))
    assert lines <= 8
