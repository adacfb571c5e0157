"""Which room of openwork may import which: downwards only, in the order of `FLOORS`, and never in a circle."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import openwork

ROOT = Path(__file__).resolve().parent.parent / "openwork"

# Each room of the package stands on one floor, the lowest first; a new room is added here.
FLOORS = (
    {"utils"},
    {"nm"},  # the mathematics of N:M
    {"layouts"},  # how a kernel wants a compressed weight in memory
    {"ops"},  # operators: schema, reference, fake kernel
    {"kernels"},  # who runs an operator on this machine
    {"methods"},  # one paper, one file
    {"training"},  # a model and its optimizer while they train
    {"files"},  # a sparse model on disk
    {"engines"},  # other software that runs a dense network
    {"inference"},  # a finished model, as fast as this machine allows
    {"pruning"},  # from a trained network: one-shot solvers, budgets
    {""},  # `openwork/__init__.py`: the public names, of the rooms below
    {"export"},  # finished models in the forms of other software
    {"integrations"},  # one object for each trainer
    {"recipes"},
    {"bench"},
    {"cli"},
    {"__main__"},  # `python -m openwork`
)
FACADE = FLOORS.index({""})
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
    "onnxruntime",
    "openvino",
    "huggingface_hub",
    "triton",
}
TRITON_KERNELS = "openwork.kernels.cuda.triton."  # its modules are imported by the functions that launch them


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of the package, and its file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(name: str) -> int:
    """Floor of a module by its dotted name; KeyError where its room is unknown."""
    room = (*name.split("."), "")[1]
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
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
    """One line per module in no known room, and per import of a higher floor."""
    known, found = modules(root), []
    for name in known:
        try:
            mine = floor(name)
        except KeyError:
            found.append(f"{name} is in no known room: add it to FLOORS in tests/test_layers.py")
            continue
        higher = [other for other in sorted(imports(name, known)) if _floor_or_top(other) > mine]
        found += [f"{name} (floor {mine}) imports {other} (floor {_floor_or_top(other)})" for other in higher]
    return found


def _floor_or_top(name: str) -> float:
    try:
        return floor(name)
    except KeyError:
        return len(FLOORS)  # reported where the module itself is looked at


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
        if _floor_or_top(name) <= FACADE:
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


def test_imports_name_modules_that_exist() -> None:
    """Also those inside functions, which run only where their package is there."""
    known = modules(ROOT)
    missing = {f"{name} imports {other}" for name in known for other in imports(name, known) - known.keys()}
    assert missing == set()


def test_no_imports_in_a_circle() -> None:
    assert circle(ROOT) == []


def test_private_names_of_torch_stand_in_one_file_for_each_purpose() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in modules(ROOT).values() if _private_of_torch(path)}
    assert users == {"utils/torch_private.py", "kernels/cuda/cusparselt.py"}


def _private_of_torch(path: Path) -> list[str]:
    """Private names of torch that a file uses: imported from a private module, or attributes of `torch` itself."""
    private = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            first, *rest = name.split(".")
            if first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest):
                private.append(name)
    return private


def test_only_the_command_line_imports_recipes() -> None:
    known = modules(ROOT)
    users = {name for name in known if any(other.startswith("openwork.recipes") for other in imports(name, known))}
    assert {name.split(".")[1] for name in users} <= {"recipes", "cli"}


def test_no_room_has_the_name_of_a_public_function() -> None:
    rooms = {path.stem for path in ROOT.iterdir()}
    public = [name for name, value in vars(openwork).items() if not inspect.ismodule(value)]
    assert rooms.isdisjoint(set(public) - {"__init__"})


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
    "__init__.py": "from openwork.nm.masks import topn\nfrom openwork.files.checkpoint import save",
    "nm/__init__.py": "",
    "nm/pattern.py": "import torch",
    "nm/masks.py": "from openwork.nm.pattern import Pattern",
    "nm/groups.py": "from . import masks",
    "files/checkpoint.py": "try:\n    import triton\nexcept ImportError: ...\ndef save():\n    import rich",
    "integrations/__init__.py": "import lightning\nimport openwork as ow",
    "recipes/__init__.py": "",
    "recipes/flow.py": "import torchvision\nfrom ..integrations import hook\nfrom . import data",
    "recipes/data.py": "",
    "cli/main.py": "def main():\n    from openwork.recipes import flow",
}


def test_a_good_package_passes(tmp_path: Path) -> None:
    root = package(tmp_path, GOOD)
    assert upward_imports(root) + circle(root) + needless_needs(root) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        (
            "nm/masks.py",
            "from openwork.training.sparsify import sparsify",
            "openwork.nm.masks (floor 1) imports openwork.training",
        ),
        ("nm/masks.py", "import openwork.recipes.flow", "openwork.nm.masks (floor 1) imports openwork.recipes.flow"),
        (
            "nm/masks.py",
            "def f():\n    from openwork.cli import main",
            "openwork.nm.masks (floor 1) imports openwork.cli",
        ),
        ("ops/pack.py", "from ..methods import STE", "openwork.ops.pack (floor 3) imports openwork.methods (floor 5)"),
        ("ops/__init__.py", "from ..methods import STE", "openwork.ops (floor 3) imports openwork.methods (floor 5)"),
        (
            "nm/masks.py",
            "import importlib\nimportlib.import_module('openwork.cli')",
            "openwork.nm.masks (floor 1) imports",
        ),
        ("nm/masks.py", "from openwork import Pattern", "openwork.nm.masks (floor 1) imports openwork (floor 11)"),
        ("__init__.py", "from openwork import integrations", "openwork (floor 11) imports openwork.integrations"),
        ("helpers.py", "", "openwork.helpers is in no known room: add it to FLOORS"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    (found,) = upward_imports(package(tmp_path, {**GOOD, file: text}))
    assert found.startswith(complaint)


def test_a_circle_within_a_room_is_found(tmp_path: Path) -> None:
    found = circle(package(tmp_path, {**GOOD, "nm/masks.py": "def f():\n    from openwork.nm.groups import rows"}))
    assert set(found) == {"openwork.nm.groups", "openwork.nm.masks"}


def test_a_need_of_the_core_is_found(tmp_path: Path) -> None:
    found = needless_needs(package(tmp_path, {**GOOD, "nm/masks.py": "import os\nfrom rich.table import Table"}))
    assert found == ["openwork.nm.masks needs rich to be imported: import it where it is used"]
