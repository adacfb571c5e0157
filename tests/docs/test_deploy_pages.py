"""Every block of docs/deploy/*.md that a reader may copy runs, page by page, after those of index.md."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from openwork.cli.main import main
from openwork.kernels.cpu import onnxruntime_operators

FOLDER = Path(__file__).parents[2] / "docs" / "deploy"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
NEEDS = {
    "onnx": "onnxruntime",
    "onnx, OpenVINO": "openvino",
    "onnxruntime": "onnxruntime",
    "huggingface, llama.cpp and GGUF": "gguf",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:chosen is empty"),
    pytest.mark.filterwarnings("ignore:no layer is faster sparse here"),  # of so small a network that may be
    pytest.mark.filterwarnings("ignore:sparse is not faster than dense here"),
    pytest.mark.filterwarnings("ignore:.*runs the dense network in"),
    pytest.mark.filterwarnings("ignore:calibrate. no int8 network"),  # where the processor has no dot products
]


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Where each block stands (the page, or the page and its section), its language, and its text."""
    for part in re.split(r"^## ", PAGES[page], flags=re.MULTILINE):
        title = page if part.startswith("# ") else f"{page}, {part.splitlines()[0]}"
        for language, text in re.findall(r"```(python|console)\n(.*?)```", part, re.DOTALL):
            yield title, language, text


def test_the_pages_have_what_this_file_runs():
    runs = {page for page in PAGES if list(blocks(page))}
    assert runs == {"index", "files", "cpu", "onnxruntime", "onnx", "torch-export", "huggingface"}
    assert NEEDS.keys() <= {title for page in PAGES for title, _, _ in blocks(page)}
    assert [language for _, language, _ in blocks("index")] == ["python"] * 3


def run(line: str) -> None:
    prompt, command, *words = shlex.split(line)
    assert (prompt, command) == ("$", "openwork")
    assert main(words) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("page", ["files", "cpu", "onnxruntime", "onnx", "torch-export", "huggingface"])
def test_a_page_runs(page, tmp_path, monkeypatch):
    if page == "onnxruntime" and not onnxruntime_operators._FILE.exists():
        pytest.skip("needs the library of operators")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    (_, _, network), *prelude = blocks("index")
    Path("net.py").write_text(network, encoding="utf-8")
    names: dict[str, object] = {}
    for title, language, text in (*prelude, *blocks(page)):
        if title in NEEDS:
            pytest.importorskip(NEEDS[title])
        if language == "python":
            exec(compile(text, f"docs/deploy: {title}", "exec"), names)
        else:
            for line in text.splitlines():
                run(line)
    assert isinstance(names["model"], torch.nn.Module)
