"""The weights of a run: written compressed by `ow.save`, read from such a file or from an ordinary safetensors file."""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import openwork as ow
from openwork.files.format import KEY

FILE = "model.safetensors"


def save_weights(net: nn.Module, path: Path) -> None:
    """A finalized network; a dense one is stored dense, which needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no pattern was given")
        ow.save(net, path)


def weights_file(source: Path, what: str) -> Path:
    """The file of a run directory, or the file itself; FileNotFoundError says what `what` may name."""
    path = source / FILE if source.is_dir() else source
    if not path.exists():
        raise FileNotFoundError(
            f"{what} {source}: there is no {path}; give a finished run directory or a .safetensors file"
        )
    return path


def is_compressed(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return KEY in (file.metadata() or {})


def read_weights(path: Path) -> dict[str, Tensor]:
    return ow.load_state_dict(path) if is_compressed(path) else load_file(path)


def load_weights(net: nn.Module, source: Path, what: str = "--init") -> None:
    """Fill a plain network from a run directory or a .safetensors file."""
    path = weights_file(source, what)
    try:
        ow.load(path, into=net) if is_compressed(path) else load_model(net, path)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{what} {path} does not fit this model; train it with the same --model and --data ({error})"
        ) from error
