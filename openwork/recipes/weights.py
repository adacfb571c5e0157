"""The weights of a run: written compressed by `ow.save`, read from such a file or from an ordinary safetensors file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import openwork as ow
from openwork.files.checkpoint import check
from openwork.files.format import KEY
from openwork.files.header import read_header
from openwork.files.reader import open_files

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
    with open_files(path, [path]) as (file,):
        return KEY in read_header(file)[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    return ow.load_state_dict(path) if is_compressed(path) else load_file(path)


def load_weights(net: nn.Module, source: Path, what: str = "--init") -> None:
    """Fill a plain network from a run directory or a .safetensors file, one of transformers also from a Hugging Face
    folder. A file in another precision, such as bfloat16, is read into that of the network."""
    if is_huggingface(source) and hasattr(net, "from_pretrained"):
        _load_pretrained(net, source, what)
        return
    path = weights_file(source, what)
    if compressed := is_compressed(path):
        check(path)  # damage has a message of its own
    try:
        net.load_state_dict(ow.load_state_dict(path)) if compressed else load_model(net, path)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{what} {path} does not fit this model; train it with the same --model and --data ({error})"
        ) from error


def is_huggingface(source: Path) -> bool:
    """Whether it is a folder with a configuration of transformers, and no run."""
    return (source / "config.json").is_file() and not (source / "config.yaml").is_file()


def _load_pretrained(net: Any, source: Path, what: str) -> None:
    """As transformers reads it: in one file or several, with or without the names of the head's base model."""
    how: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": net.dtype}
    try:
        found, told = type(net).from_pretrained(source, output_loading_info=True, **how)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"it lacks {', '.join(missing[:5])}")
        net.load_state_dict(found.state_dict())
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{what} {source} does not fit this model: give its folder as --model too ({error})"
        ) from error
