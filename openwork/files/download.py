"""A file from an http(s) address, within a time and a size, and without its secrets in any error."""

from __future__ import annotations

import base64
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

_PATIENCE = 60  # seconds in which something must come
_SLOWEST = 1000  # bytes of the file in a second, in each of these times; nothing else that comes counts
_HOST = re.compile(r"(?:[^\s:@\[\]]*|\[[0-9a-fA-F:.]+\])(?::\d*)?")


def download(url: str, path: Path, room: int) -> Path:
    """The file at an address, whole, of at most `room` bytes. Raises OSError for what goes wrong on the way, and names
    the address, without what may be secret in it."""
    if shown(url).endswith("://..."):
        raise OSError(f"{shown(url)} is no address: in a name or password, / ? # @ : are written %2F %3F %23 %40 %3A")
    failed: OSError | None = None
    try:
        bare, login = _without_user(url)
        request = urllib.request.Request(bare, headers={"User-Agent": "openwork", "Accept-Encoding": "identity"})
        if login:
            request.add_unredirected_header("Authorization", f"Basic {login}")  # not sent to where it leads
        with _watched() as watch, _opener(watch).open(request, timeout=_PATIENCE) as answer:
            _receive(answer, path, room, watch)
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) if type(error) is urllib.error.URLError else error
        failed = OSError(f"{shown(url)} could not be fetched: {_cleaned(str(reason) or type(error).__name__, url)}")
    if failed:  # here, so that no traceback shows the first error, which may have secrets in it
        raise failed
    return path


def shown(url: str) -> str:
    """An address without name, password, query and fragment; any other text as it is.

    >>> shown("https://me:secret@host/net.safetensors?token=abc")
    'https://host/net.safetensors?...'
    """
    if not re.match(r"\w+://", url):
        return url
    scheme, _, rest = url.partition("://")
    place, mark, _ = re.sub(r"#.*", "", rest, flags=re.DOTALL).partition("?")
    host, slash, path = place.partition("/")
    host = host.rpartition("@")[2]
    if not _HOST.fullmatch(host) or (":" in host and "@" in path):  # a password with / or # or ? in it
        return f"{scheme}://..."
    return f"{scheme}://{host}{slash}{path}{'?...' if mark else ''}"


def _cleaned(text: str, url: str) -> str:
    """A message in which addresses are as `shown`, and nothing stands that `shown` takes out of this one."""
    text = re.sub(r"\w+://[^\s'\"<>]+", lambda match: shown(match[0]), text)
    user, _, query = url.partition("?")
    user = user.partition("://")[2].partition("/")[0].rpartition("@")[0]
    parts = {user, *user.split(":"), query, *re.split("[&=#]", query)}
    for secret in sorted((part for each in parts for part in (each, unquote(each))), key=len, reverse=True):
        if len(secret) > 3:
            text = text.replace(secret, "...")
    return text


def _without_user(url: str) -> tuple[str, str]:
    """An address without name and password, and these as HTTP sends them; nothing where there are none."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    login = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    return urlunsplit(parts._replace(netloc=host, fragment="")), login if at else ""


class _Watch:
    """Ends an exchange in which too little comes: from its beginning to its end, in each `_PATIENCE` seconds."""

    def __init__(self) -> None:
        self.got, self.late = 0, False
        self._start, self._sockets, self._done = time.monotonic(), [], threading.Event()  # type: ignore[var-annotated]

    def guard(self, connection: socket.socket) -> None:
        """Shut this one too when time is over."""
        self._sockets.append(connection)
        if self.late:
            _shut(connection)

    def run(self) -> None:
        before = 0
        while not self._done.wait(_PATIENCE):
            if self.got - before < _SLOWEST * _PATIENCE:
                self.late = True
                for each in self._sockets:
                    _shut(each)
                return
            before = self.got

    def end(self) -> None:
        self._done.set()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._start
        return f"timed out: {self.got} bytes of the file came in {seconds:.0f} seconds, which is too slow"


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # below TLS, whose own one may wait


@contextmanager
def _watched() -> Iterator[_Watch]:
    """A watch that runs meanwhile. Raises TimeoutError where it ended the exchange, whatever that looked like."""
    watch = _Watch()
    thread = threading.Thread(target=watch.run, name="openwork-download", daemon=True)
    thread.start()
    try:
        yield watch
    except (OSError, ValueError, HTTPException):
        if not watch.late:
            raise
    finally:
        watch.end()
        thread.join()
    if watch.late:
        raise TimeoutError(str(watch))


def _opener(watch: _Watch) -> urllib.request.OpenerDirector:
    """Opens addresses by connections that the watch knows as soon as they are made."""

    def known(kind: Any) -> Any:
        class Known(kind):
            @property
            def sock(self) -> socket.socket | None:
                return self._sock

            @sock.setter
            def sock(self, connection: socket.socket | None) -> None:  # the bare one, then that of TLS
                self._sock = connection
                if connection is not None:
                    watch.guard(connection)

        return Known

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> HTTPResponse:
            return self.do_open(known(HTTPConnection), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> HTTPResponse:
            return self.do_open(known(HTTPSConnection), req, context=self._context)  # type: ignore[attr-defined]

    return urllib.request.build_opener(Http, Https, Redirects)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows addresses of the web alone, and none from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = "https" if req.type == "https" else "https?"
        if not re.match(f"{allowed}://", newurl, re.IGNORECASE):
            raise ValueError(f"it leads to {shown(newurl)}, and only addresses of {allowed} are followed")
        fp.close()  # urllib would read all of what comes with it into memory
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(answer: Any, path: Path, room: int, watch: _Watch) -> None:
    """Write the body of an answer to a file."""
    declared = answer.headers.get("Content-Length")
    size = int(declared) if declared is not None and declared.isdecimal() and len(declared) < 4000 else None
    with path.open("wb") as file:
        while True:
            if max(size or 0, watch.got) > room:
                raise ValueError(
                    f"it has {size or f'more than {watch.got}'} bytes, half of the disk is {room}: set TMPDIR"
                )
            chunk = answer.read1(1 << 20)
            watch.got += file.write(chunk)
            if not chunk:
                break
    if size is not None and watch.got < size:
        raise ValueError(f"it ended after {watch.got} of {size} bytes")
