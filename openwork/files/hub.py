"""Where a model may come from: a path, an http(s) address, a name on the Hugging Face Hub.

Names of the Hub are huggingface_hub's work. Other addresses are fetched here: `torch.hub.download_url_to_file` limits
neither the size of an answer nor the time a server may take, and follows redirections of every kind.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any

from openwork.files.reader import FILE

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATIENCE = 60  # seconds that a server may be silent
_SLOWEST = 1000  # bytes in a second, once that time is over


@contextmanager
def local(source: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """A path that holds what `source` names. What came from an address is deleted afterwards; what came from the Hub
    stays in the Hub's own cache. Errors of huggingface_hub, which fetches it, come as they are."""
    text = os.fspath(source)
    if re.match("https?://", text, re.IGNORECASE):
        with tempfile.TemporaryDirectory() as folder:
            path = _downloaded(text, Path(folder) / "model.safetensors")
            try:
                yield path
            except ValueError as error:
                raise ValueError(f"{text}: {error}") from error
    elif _HUB_NAME.fullmatch(text) and not text.endswith(".safetensors") and not os.path.exists(text):
        yield _from_hub(text)
    else:
        yield source


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows addresses of the web alone, and none from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = "https" if req.type == "https" else "https?"
        if not re.match(f"{allowed}://", newurl, re.IGNORECASE):
            raise ValueError(f"it leads to {newurl}, and only addresses of {allowed} are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _downloaded(url: str, path: Path) -> Path:
    """The file at an address, whole. Raises OSError for what goes wrong on the way, and names the address."""
    request = urllib.request.Request(url, headers={"User-Agent": "openwork", "Accept-Encoding": "identity"})
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=_PATIENCE) as answer:
            _receive(answer, path)
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) if type(error) is urllib.error.URLError else error
        raise OSError(f"{url} could not be fetched: {reason or type(error).__name__}") from error
    return path


def _receive(answer: Any, path: Path) -> None:
    """Write the body of an answer to a file; at most half of the free disk, and no slower than `_SLOWEST`."""
    declared = answer.headers.get("Content-Length")
    size = int(declared) if declared is not None and declared.isdecimal() else None
    room, start, got = shutil.disk_usage(path.parent).free // 2, time.monotonic(), 0
    with path.open("wb") as file:
        while True:
            if max(size or 0, got) > room:
                raise ValueError(f"it has {size or f'more than {got}'} bytes, half of the disk is {room}: set TMPDIR")
            chunk = answer.read1(1 << 20)
            got += file.write(chunk)
            if not chunk:
                break
            seconds = time.monotonic() - start
            if seconds > _PATIENCE and got < _SLOWEST * seconds:
                raise TimeoutError(f"{got} bytes came in {seconds:.0f} seconds, which is too slow")
    if size is not None and got < size:
        raise ValueError(f"it ended after {got} of {size} bytes")


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
            f"there is no file {source}; to fetch a model of the Hugging Face Hub, pip install huggingface_hub"
        ) from error
    return huggingface_hub
