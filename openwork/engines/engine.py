"""The engines that run a dense network on a CPU, by name, and which of them are here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from openwork.engines.case import PRECISIONS


@dataclass(frozen=True)
class Engine:
    """`prepare` is "module:function": Case -> Prepared, called in the engine's own process, in one of `precisions`.
    `needs`: packages beside torch. What reads ONNX runs after `onnx_files` has written it."""

    name: str
    prepare: str
    precisions: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def reads_onnx(self) -> bool:
        """Whether it takes an ONNX file, and not torch's module."""
        return "onnx" in self.needs

    def missing(self) -> str:
        """Empty where the engine is installed, else one line with the command that installs it."""
        absent = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"{self.name} is not installed: pip install {' '.join(absent)}" if absent else ""


_TORCH, _ONNX = "openwork.engines.torch_engines", "openwork.engines.onnx_engines"
ENGINES = (
    Engine("eager", f"{_TORCH}:eager", PRECISIONS),
    Engine("channels_last", f"{_TORCH}:channels_last", ("float32", "bfloat16")),
    Engine("compiled", f"{_TORCH}:compiled", ("float32", "bfloat16")),
    Engine("OpenVINO", f"{_ONNX}:openvino", PRECISIONS, ("openvino", "onnx", "onnxscript")),
    Engine("ONNX Runtime", f"{_ONNX}:onnxruntime", ("float32", "int8"), ("onnxruntime", "onnx", "onnxscript")),
)


def engines_named(names: list[str]) -> tuple[Engine, ...]:
    """The engines of these names, in the order of `ENGINES`. Raises ValueError for others.

    >>> [engine.name for engine in engines_named(["OpenVINO", "eager"])]
    ['eager', 'OpenVINO']
    """
    known = {engine.name: engine for engine in ENGINES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no engine {', '.join(unknown)}; needed some of {', '.join(known)}")
    return tuple(engine for name, engine in known.items() if name in names)
