"""Run the tutorials from top to bottom. `python docs/_site/run_notebooks.py [FILE ...]` stores their outputs; the tests
only look whether they run. No Jupyter is needed, and code cells are plain Python.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parents[1] / "tutorials"
# Readable on a light and on a dark page.
_INK = dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], "#7f868f")
_STYLE = {**_INK, "figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0, "svg.hashsalt": "0"}


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of running it in the current folder: what is printed, the value of the last
    expression, and figures."""
    import matplotlib

    matplotlib.use("Agg")
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    with matplotlib.rc_context(_STYLE):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell["execution_count"] = count
                cell["outputs"] = _outputs("".join(cell["source"]), f"{path.name}, code cell {count}", names)
    return notebook


def _outputs(source: str, where: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        value = _run_cell(source, where, names)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return outputs + [{"data": figure, "metadata": {}, "output_type": "display_data"} for figure in _figures()]


def _run_cell(source: str, where: str, names: dict[str, Any]) -> Any:
    body = ast.parse(source, where).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), where, "exec"), names)
    return eval(compile(ast.Expression(last.value), where, "eval"), names) if last else None


def _figures() -> list[dict[str, list[str]]]:
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        file = io.StringIO()
        plt.figure(number).savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
        found.append({"image/svg+xml": svg.splitlines(keepends=True)})
        plt.close(number)
    return found


def main(files: list[str]) -> None:
    os.environ.pop("OPENWORK_SHORT", None)
    for path in [Path(file).resolve() for file in files] or sorted(TUTORIALS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            notebook = run(path)
            os.chdir(TUTORIALS)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
