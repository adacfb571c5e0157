"""Servers that keep one waiting: an exchange ends, whatever part of it is slow; and errors repeat no secrets."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.files import download
from openwork.files.download import shown

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nContent-Length: 100000\r\nLocation: /there\r\n\r\n"

# What a server sends at once, and what it then sends every 20 ms, without end.
SLOW = {
    "nothing": (b"", b""),
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "headers": (OK, b"X: y\r\n"),
    "one header": (OK + b"X: ", b"y"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body with a length": (OK + b"Content-Length: 100000\r\n\r\n", b"x"),
    "body without a length": (OK + b"\r\n", b"x"),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"5;", b"x"),
    "small chunks": (CHUNKED, b"1\r\nx\r\n"),
    "trailers": (CHUNKED + b"3\r\nabc\r\n0\r\n", b"X: y\r\n"),
    "body of a redirection": (MOVED, b"x"),
    "body of an error": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 100000\r\n\r\n", b"x"),
    "after much": (OK + b"Content-Length: 10000000\r\n\r\n" + bytes(1_000_000), b"x"),
}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(download, "_PATIENCE", 0.4)
    return 0.4


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server of two pieces; gives its address."""
    servers, gone = [], threading.Event()

    def talk(connection: socket.socket, first: bytes, piece: bytes, context: ssl.SSLContext | None) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) if context else connection as wrapped:
                wrapped.recv(9999)
                wrapped.sendall(first)
                while not gone.wait(0.02):
                    wrapped.sendall(piece)
        except OSError:
            return

    def accept(server: socket.socket, *args: object) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection, *args), daemon=True).start()

    def start(first: bytes, piece: bytes, context: ssl.SSLContext | None = None) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        threading.Thread(target=accept, args=(server, first, piece, context), daemon=True).start()
        return f"http{'s' if context else ''}://127.0.0.1:{server.getsockname()[1]}/net"

    yield start
    gone.set()
    for each in servers:
        each.close()


@pytest.mark.parametrize("what", [each for each in SLOW if each not in ("body of an error", "body of a redirection")])
def test_every_part_of_an_exchange_has_an_end(serve: Callable[..., str], patience: float, what: str) -> None:
    address = serve(*SLOW[what])
    with pytest.raises(OSError, match=f"{address} could not be fetched: .*timed out"):
        ow.load_state_dict(address)
    assert not any(thread.name == "openwork-download" for thread in threading.enumerate())


def test_an_error_is_not_read_to_its_end(serve: Callable[..., str], patience: float) -> None:
    with pytest.raises(OSError, match="404"):
        ow.load_state_dict(serve(*SLOW["body of an error"]))


def test_what_comes_with_a_redirection_is_not_read(serve: Callable[..., str], patience: float) -> None:
    for first, piece in (SLOW["body of a redirection"], (SLOW["body of a redirection"][0], bytes(1 << 20))):
        tracemalloc.start()
        with pytest.raises(OSError, match="infinite loop"):
            ow.load_state_dict(serve(first, piece))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(path.with_name("cert"))]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl")
    path.write_text(path.read_text() + path.with_name("cert").read_text())
    return path


@pytest.mark.parametrize("what", ["headers", "body with a length", "chunk size"])
def test_under_tls_too(
    serve: Callable[..., str], patience: float, what: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setattr(download, "_PATIENCE", 3 * patience)  # for the handshake
    with pytest.raises(OSError, match=r"could not be fetched: .*timed out"):
        ow.load_state_dict(serve(*SLOW[what], context))


def test_a_handshake_that_does_not_end(serve: Callable[..., str], patience: float) -> None:
    address = serve(b"\x16\x03\x03\x40\x00", b"\x02").replace("http:", "https:")
    with pytest.raises(OSError, match="could not be fetched"):
        ow.load_state_dict(address)


def test_a_slow_server_that_is_fast_enough_is_waited_for(
    serve: Callable[..., str], patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as long as the patience, in small pieces."""
    patience *= 2
    monkeypatch.setattr(download, "_PATIENCE", patience)
    monkeypatch.setattr(download, "_SLOWEST", 10)
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "net", pattern="2:4")
    content = (tmp_path / "net").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for start in range(0, len(content), 32):
                self.wfile.write(content[start : start + 32])
                time.sleep(2 * patience / (len(content) / 32))

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        state = ow.load_state_dict(f"http://127.0.0.1:{server.server_address[1]}/net")
    finally:
        server.shutdown()
        server.server_close()
    assert torch.equal(state["weight"], model.weight)


# --- secrets ------------------------------------------------------------------------------------------------------

SECRETS = ("hunter2", "s3cr3tname", "t0ken", "fr4gment")
LOCATION = "s3cr3tname:hunter2@127.0.0.1:{port}/net?X-Signature=t0ken&b=t0ken2#fr4gment"


def test_an_address_is_shown_without_its_secrets() -> None:
    for url, expected in {
        "https://s3cr3tname:hunter2@host:80/a/b?t=t0ken#fr4gment": "https://host:80/a/b?...",
        "https://t0ken@host/a@b": "https://host/a@b",
        "https://host/a": "https://host/a",
        "https://[::1]:80/a?t0ken": "https://[::1]:80/a?...",
        "https://me:hunter2/x@host/a": "https://...",
        "https://me:1234/hunter2@host/a": "https://...",
        "https://me:hunter2#x@host/a": "https://...",
        "https://me:hunter2?x@host/a": "https://...",
        "ftp://me:hunter2@host/a": "ftp://host/a",
        "runs/a?b": "runs/a?b",
    }.items():
        assert shown(url) == expected


def answers() -> dict[str, bytes]:
    return {
        "not found": b"HTTP/1.1 404 no t0ken2 for s3cr3tname:hunter2\r\n\r\n",
        "cut": OK + b"Content-Length: 10\r\n\r\nabc",
        "nonsense": b"hunter2 t0ken s3cr3tname\r\n\r\n",
        "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: ftp://s3cr3tname:hunter2@h/a?t0ken#fr4gment\r\n\r\n",
        "in circles": b"HTTP/1.1 302 Found\r\nLocation: /net?X-Signature=t0ken\r\n\r\n",
        "no model": OK + b"Content-Length: 3\r\n\r\nabc",
    }


@pytest.mark.parametrize("what", answers())
def test_no_error_repeats_what_is_secret_in_an_address(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(9999))
                    connection.sendall(answers()[what])

        threading.Thread(target=answer, daemon=True).start()
        url = "http://" + LOCATION.format(port=server.getsockname()[1])
        for read in (ow.load_state_dict, lambda url: ow.load_deployed(url, nn.Linear(8, 4), torch.ones(1, 8))):
            with pytest.raises((OSError, ValueError), match=r"http://127\.0\.0\.1:\d+/net\?\.\.\.") as caught:
                read(url)
            text = "".join(traceback.format_exception(caught.value))
            error = "\n".join(line for line in text.splitlines() if not line.startswith("  "))
            assert not [secret for secret in SECRETS if secret in error]
        for command in (["inspect", url], ["verify", url], ["plan", url], ["export", url, "--out", "x.safetensors"]):
            assert main(command) == 2
            printed = "".join(capsys.readouterr())
            assert not [secret for secret in SECRETS if secret in printed]
            assert "http://127.0.0.1" in printed
        server.shutdown(socket.SHUT_RDWR)
    assert b"Authorization: Basic czNjcjN0bmFtZTpodW50ZXIy\r\n" in asked[0]  # the server itself is told


@pytest.mark.parametrize(
    "url",
    ["http://[hunter2", "http://a b/?t0ken", "http://me:hunter2/x@h/", "http://h:hunter2/", "ftp://u:hunter2@h/a"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises((OSError, ValueError)) as caught:
        ow.load_state_dict(url)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_a_login_is_not_passed_on(serve: Callable[..., str]) -> None:
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(bytes(self.headers))
            self.send_response(302 if self.path == "/net" else 404)
            self.send_header("Location", "/there")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(OSError, match="404"):
        ow.load_state_dict(f"http://me:hunter2@127.0.0.1:{server.server_address[1]}/net")
    server.shutdown()
    server.server_close()
    assert [b"Authorization" in each for each in asked] == [True, False]
