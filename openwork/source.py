"""Where a model may come from: a path, an http(s) address, a name on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from openwork.contents import FILE

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@contextmanager
def local(source: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """A path that holds what `source` names. What came from an address is deleted afterwards; what came from the Hub
    stays in the Hub's own cache. Errors of huggingface_hub, which fetches both, come as they are."""
    text = os.fspath(source)
    if re.match("https?://", text, re.IGNORECASE):
        with tempfile.TemporaryDirectory() as folder:
            yield _downloaded(text, Path(folder) / "model.safetensors")
    elif _HUB_NAME.fullmatch(text) and not text.endswith(".safetensors") and not os.path.exists(text):
        yield _from_hub(text)
    else:
        yield source


def _downloaded(url: str, path: Path) -> Path:
    _hub(url)
    from huggingface_hub.file_download import http_get

    with path.open("wb") as file:
        http_get(url, file)
    return path


def _from_hub(name: str) -> str:
    """The compressed file of a repository; without one, the folder of the parts of a model."""
    hub = _hub(name)
    try:
        path: str = hub.hf_hub_download(name, FILE)
    except hub.errors.EntryNotFoundError:
        path = hub.snapshot_download(name, allow_patterns="model*.safetensors")
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"there is no file {name} here, and no model of that name on the Hub") from error
    return path


def _hub(source: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no file {source}; to fetch an address or a model of the Hugging Face Hub, "
            "pip install huggingface_hub"
        ) from error
    return huggingface_hub
