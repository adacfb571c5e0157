"""Where a model may come from: a path, an http(s) address, a repository of the Hugging Face Hub.

The Hub is huggingface_hub's work, and asked for hf://owner/name alone: a path with a typing error stays a path. Other
addresses are fetched here: no library bounds an exchange as a whole, neither its size nor its time (the time limits of
urllib, requests and httpx are for one wait of many), and `torch.hub` follows redirections of every kind.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from openwork.files.download import download, shown
from openwork.files.reader import FILE

_HUB = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?/?")


def is_address(source: str | os.PathLike[str]) -> bool:
    """Whether a source is an address, of whatever kind, and no path."""
    return bool(re.match(r"[a-z][\w+.-]*://", os.fsdecode(source), re.IGNORECASE))


@contextmanager
def local(source: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """A path that holds what `source` names. What came from an address is deleted afterwards; what came from the Hub
    stays in the Hub's own cache. Errors of huggingface_hub, which fetches it, come as they are."""
    text = os.fsdecode(source)
    scheme = text.partition("://")[0].lower()
    if not is_address(text):
        _check_exists(text)
        yield text
    elif scheme == "hf":
        yield _from_hub(text)
    elif scheme in ("http", "https"):
        with tempfile.TemporaryDirectory() as folder:
            path = download(text, Path(folder) / "model.safetensors", shutil.disk_usage(folder).free // 2)
            try:
                yield path
            except ValueError as error:
                raise ValueError(f"{shown(text)}: {error}") from error
    else:
        raise ValueError(f"{shown(text)}: needed a path, or an address that begins with https://, http:// or hf://")


def _check_exists(path: str) -> None:
    """Raise FileNotFoundError, with what might have been meant, where there is no such path."""
    if not os.path.lexists(path):
        meant = f"; a repository of the Hugging Face Hub is named hf://{path}" if _HUB.fullmatch(f"hf://{path}") else ""
        raise FileNotFoundError(errno.ENOENT, f"No such file or directory{meant}", path)


def _from_hub(address: str) -> str:
    """The compressed file of a repository; without one, the folder of the parts of a model."""
    match = _HUB.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}: needed hf://owner/name or hf://owner/name@revision")
    name, revision = match[1], match[2]
    hub = _hub(address)
    try:
        path: str = hub.hf_hub_download(name, FILE, revision=revision)
    except hub.errors.EntryNotFoundError as error:
        if isinstance(error, getattr(hub.errors, "LocalEntryNotFoundError", ())):  # the Hub was not reached
            raise
        path = hub.snapshot_download(name, allow_patterns="model*.safetensors", revision=revision)
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{address}: the Hub has no model of that name, or not for you") from error
    return path


def _hub(address: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            f"{address}: to fetch a model of the Hugging Face Hub, pip install huggingface_hub"
        ) from error
    return huggingface_hub
