"""Messages on docs/troubleshooting.md are messages of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OF_OTHERS = (
    "openwork:SparseLinear(-1) is not",
    "We failed to resolve",
    "Could not find schema",
    "operator torchvision::nms",
    "Openwork needs Python",
)
# The first cell of a row begins with a message; those without one describe what is seen.
MESSAGES = [
    message
    for cell in re.findall(r"^\| (`.*?`.*?) \| ", PAGE, re.MULTILINE)
    for message in re.findall(r"`([^`]+)`", cell)
    if not message.startswith(OF_OTHERS) and message != "NotSparse"
]


@pytest.fixture(scope="module")
def texts():
    """Every text of the package but docstrings, with a line break where an f-string puts a value in."""
    found = []
    for path in (ROOT / "openwork").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\0".join(found)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_ours(message, texts):
    for part in message.split("..."):
        words = part.removeprefix("NotSparse: ").strip(" ;,:")
        assert words in texts, f"no message of the package has {words!r}"
