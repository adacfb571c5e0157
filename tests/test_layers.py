"""Which part of openwork may import which: downwards only, in the order of `LAYERS`, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "openwork"

# Each file and folder of the package stands in exactly one layer; a new one is added here.
LAYERS = (
    {"pattern"},
    {"masks", "axis", "schedule", "metrics", "packing", "layout", "transposable", "entropic"},
    {"ops"},
    {"methods", "kernels", "topology"},
    {
        "sparsify",
        "attach",
        "verify",
        "deploy",
        "parametrization",
        "masked_class",
        "scope",
        "lists",
        "promise",
        "candidates",
        "report",
        "gemms",
        "sharded",
        "planning",
        "accelerate",
        "deployed",
        "folding",
        "onednn",
        "deployed_gpu",
        "semistructured",
    },
    {
        "checkpoint",
        "modelstate",
        "contents",
        "fileformat",
        "container",
        "legacy",
        "source",
        "loading",
        "export",
        "migrate",
    },
    {"integrations"},
    {"tasks", "bench", "cli", "exporting"},
)
# `openwork/__init__.py` collects the public names: above the core, below what glues the core to other libraries.
FACADE = 5.5
CORE_NEEDS = {"torch", "numpy", "safetensors"}
IMPORTED_ON_DEMAND = {
    "torch._dynamo",
    "lightning",
    "pytorch_lightning",
    "torchvision",
    "transformers",
    "rich",
    "matplotlib",
    "onnx",
    "huggingface_hub",
    "triton",
}
TRITON_KERNELS = "openwork.kernels.triton."  # its modules are imported by the functions that launch them


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of the package, and its file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(name: str) -> float:
    """Layer of a module by its dotted name; KeyError where it has none."""
    first = name.split(".")[1:2]
    if not first:
        return FACADE
    for number, members in enumerate(LAYERS):
        if first[0] in members:
            return number
    raise KeyError(name)


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """Modules of its own package that a module imports, at its top or inside functions."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(known[name].read_text(encoding="utf-8"))
    targets = {target for node in ast.walk(tree) for target in _targets(node, package, known)}
    return {target for target in targets if target.split(".")[0] == name.split(".")[0]}


def _targets(node: ast.AST, package: str, known: dict[str, Path]) -> Iterator[str]:
    match node:
        case ast.Import(names=aliases):
            yield from (alias.name for alias in aliases)
        case ast.ImportFrom(module=module, names=aliases, level=dots):
            base = resolve_name("." * dots + (module or ""), package)
            for alias in aliases:  # `from package import name` may mean a module or what its __init__ defines
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(target)), *_]):
            yield resolve_name(target, package)


def upward_imports(root: Path) -> list[str]:
    """One line per module without a layer, and per import of a higher layer."""
    known, found = modules(root), []
    for name in known:
        try:
            mine = layer(name)
        except KeyError:
            found.append(f"{name} has no layer: add it to LAYERS in tests/test_layers.py")
            continue
        higher = [other for other in sorted(imports(name, known)) if _layer_or_top(other) > mine]
        found += [f"{name} (layer {mine}) imports {other} (layer {_layer_or_top(other)})" for other in higher]
    return found


def _layer_or_top(name: str) -> float:
    try:
        return layer(name)
    except KeyError:
        return len(LAYERS)  # reported where the module itself is looked at


def circle(root: Path) -> list[str]:
    """Modules that import one another in a circle, first and last the same; empty where there is none."""
    known = modules(root)
    graph = {name: imports(name, known) & known.keys() - {name} for name in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def needless_needs(root: Path) -> list[str]:
    """One line per core module that cannot be imported without a package that the core does not need."""
    allowed = CORE_NEEDS | sys.stdlib_module_names | {root.name}
    found = []
    for name, path in modules(root).items():
        if _layer_or_top(name) <= FACADE:
            needed = _needed(ast.parse(path.read_text(encoding="utf-8"))) - allowed
            needed -= {"triton"} if name.startswith(TRITON_KERNELS) else set()
            found += [f"{name} needs {other} to be imported: import it where it is used" for other in sorted(needed)]
    return found


def _needed(tree: ast.Module) -> set[str]:
    """Packages imported by statements at the top of a module; inside `try` or a function nothing is needed."""
    absolute = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    plain = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in [*absolute, *plain] if name}


# --- the package -------------------------------------------------------------------------------------------------


def test_imports_point_downwards() -> None:
    assert upward_imports(ROOT) == []


def test_no_imports_in_a_circle() -> None:
    assert circle(ROOT) == []


def test_core_needs_little() -> None:
    assert needless_needs(ROOT) == []


def test_openwork_alone_imports_nothing_heavy() -> None:
    script = f"import sys, openwork; print(*sorted(set(sys.modules) & {IMPORTED_ON_DEMAND}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- the checker, on small packages ------------------------------------------------------------------------------


def package(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "openwork"
    for name, text in {"__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


GOOD = {
    "__init__.py": "from openwork.masks import topn\nfrom openwork.checkpoint import save",
    "pattern.py": "import torch",
    "masks.py": "from openwork.pattern import Pattern",
    "axis.py": "from . import masks",
    "checkpoint.py": "try:\n    import triton\nexcept ImportError: ...\ndef save():\n    import rich",
    "integrations/__init__.py": "import lightning\nimport openwork as ow",
    "tasks/__init__.py": "",
    "tasks/flow.py": "import torchvision\nfrom ..integrations import hook\nfrom . import data",
    "tasks/data.py": "",
    "cli.py": "def main():\n    from openwork.tasks import flow",
}


def test_a_good_package_passes(tmp_path: Path) -> None:
    root = package(tmp_path, GOOD)
    assert upward_imports(root) + circle(root) + needless_needs(root) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("masks.py", "from openwork.sparsify import sparsify", "openwork.masks (layer 1) imports openwork.sparsify"),
        ("masks.py", "import openwork.tasks.flow", "openwork.masks (layer 1) imports openwork.tasks.flow (layer 7)"),
        ("masks.py", "def f():\n    from openwork import cli", "openwork.masks (layer 1) imports openwork.cli"),
        ("ops/pack.py", "from ..methods import STE", "openwork.ops.pack (layer 2) imports openwork.methods (layer 3)"),
        ("ops/__init__.py", "from ..methods import STE", "openwork.ops (layer 2) imports openwork.methods (layer 3)"),
        ("masks.py", "import importlib\nimportlib.import_module('openwork.cli')", "openwork.masks (layer 1) imports"),
        ("masks.py", "from openwork import Pattern", "openwork.masks (layer 1) imports openwork (layer 5.5)"),
        ("__init__.py", "from openwork import integrations", "openwork (layer 5.5) imports openwork.integrations"),
        ("helpers.py", "", "openwork.helpers has no layer: add it to LAYERS"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    (found,) = upward_imports(package(tmp_path, {**GOOD, file: text}))
    assert found.startswith(complaint)


def test_a_circle_within_a_layer_is_found(tmp_path: Path) -> None:
    found = circle(package(tmp_path, {**GOOD, "masks.py": "def f():\n    from openwork.axis import rows"}))
    assert set(found) == {"openwork.axis", "openwork.masks"}


def test_a_need_of_the_core_is_found(tmp_path: Path) -> None:
    found = needless_needs(package(tmp_path, {**GOOD, "masks.py": "import os\nfrom rich.table import Table"}))
    assert found == ["openwork.masks needs rich to be imported: import it where it is used"]
