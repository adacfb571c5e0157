"""Every block of docs/deploy.md that a reader may copy runs, section by section."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from openwork.cli.main import main
from openwork.kernels.cpu import onnxruntime_operators

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
FIRST, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
BLOCKS = {part.split("\n")[0]: re.findall(r"```(python|console)\n(.*?)```", part, re.DOTALL) for part in SECTIONS}
NEEDS = {
    "ONNX Runtime": "onnxruntime",
    "ONNX Runtime with our kernels": "onnxruntime",
    "OpenVINO": "openvino",
    "llama.cpp and GGUF": "gguf",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:chosen is empty"),
    pytest.mark.filterwarnings("ignore:no layer is faster sparse here"),  # of so small a network that may be
    pytest.mark.filterwarnings("ignore:sparse is not faster than dense here"),
    pytest.mark.filterwarnings("ignore:calibrate. no int8 network"),  # where the processor has no dot products
]


def test_the_page_has_what_this_file_runs():
    assert {name for name, blocks in BLOCKS.items() if blocks} == {
        "The compressed file",
        "This CPU, without the dense model",
        "ONNX Runtime",
        "ONNX Runtime with our kernels",
        "OpenVINO",
        "torch.export and AOTInductor",
        "Hugging Face",
        "llama.cpp and GGUF",
    }
    assert len(re.findall("```python", FIRST)) == 2


def run(line: str) -> None:
    prompt, command, *words = shlex.split(line)
    assert (prompt, command) == ("$", "openwork")
    assert main(words) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name, blocks in BLOCKS.items() if blocks])
def test_a_section_runs(section, tmp_path, monkeypatch):
    if section in NEEDS:
        pytest.importorskip(NEEDS[section])
    if section == "ONNX Runtime with our kernels" and not onnxruntime_operators._FILE.exists():
        pytest.skip("needs the library of operators")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    network, prelude = (code for _, code in re.findall("```(python)\n(.*?)```", FIRST, re.DOTALL))
    Path("net.py").write_text(network, encoding="utf-8")
    names: dict[str, object] = {}
    blocks = [("python", prelude), *BLOCKS[section]]
    if section == "OpenVINO":  # the file of the section before
        blocks[1:1] = BLOCKS["ONNX Runtime"][:1]
    if section != "The compressed file":
        blocks[1:1] = [("python", 'model = ow.load("net.safetensors", into=network()).eval()')]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, f"docs/deploy.md, {section}", "exec"), names)
        else:
            for line in text.splitlines():
                run(line)
    assert isinstance(names["model"], torch.nn.Module)
