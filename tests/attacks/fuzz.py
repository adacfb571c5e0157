"""Fuzz the reader of files for as long as you like, guided by the branches that it takes:

    pip install atheris
    python tests/attacks/fuzz.py -max_total_time=600 [folder to keep what was tried]

Stops at the first file that raises anything but ValueError, or is accepted although safetensors or a second look
disagrees (`hold` of test_attacks.py), and writes it to crash-*. Not run by the tests: atheris is no dependency.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # its own folder has a file of the name `attacks`
from attacks.attacks import ALL  # noqa: E402
from attacks.forge import good  # noqa: E402
from attacks.test_attacks import hold  # noqa: E402

PARTS = ("container", "contents", "fileformat", "legacy", "packing")


def instrument() -> None:
    """Let atheris see the branches of the functions that read files: in place, since others have imported them."""
    import atheris

    for part in PARTS:
        module = importlib.import_module(f"openwork.{part}")
        for each in vars(module).values():
            if inspect.isfunction(each) and each.__module__ == module.__name__:
                atheris.instrument_func(each)


def main() -> None:
    import atheris

    instrument()
    with tempfile.TemporaryDirectory() as folder:
        path, seeds = Path(folder) / "net.safetensors", Path(folder) / "seeds"
        seeds.mkdir()
        contents = {"good": good(), **{str(i): content for i, (content, _) in enumerate(ALL.values())}}
        for name, content in contents.items():
            if len(content) < 10_000:
                (seeds / name).write_bytes(content)

        def one(data: bytes) -> None:
            end = data.rfind(b"]}}") + 3
            if len(data) > 8 and data[7] & 1:  # half of the files get a length that fits, which keeps the rest in play
                data = max(0, end - 8).to_bytes(8, "little") + data[8:]
            path.write_bytes(data)
            hold(path)

        atheris.Setup([*sys.argv, str(seeds), "-max_len=4096"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
