"""Addresses and names of the Hub, against a server in this process."""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.files import download
from openwork.files.checkpoint import describe
from openwork.files.reader import FILE


@pytest.fixture
def model():
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    return model


@pytest.fixture
def served(tmp_path, model):
    """(address of a server, what it serves by path, the paths that it was asked for)."""
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    content = (tmp_path / "net.safetensors").read_bytes()
    files, asked = {"/net.safetensors": content}, []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            found = files.get(self.path)
            self.send_response(404 if found is None else 200)
            if found is None and self.path.startswith("/org/net/"):
                self.send_header("X-Error-Code", "EntryNotFound")
            elif found is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(found or b"")))
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            return found or b""

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", files, asked
    server.shutdown()
    server.server_close()


def test_an_address(served, model):
    address, files, _ = served
    assert torch.equal(ow.load_state_dict(f"{address}/net.safetensors")["weight"], model.weight)
    twin = ow.load(f"{address}/net.safetensors", into=nn.Linear(8, 4))
    assert torch.equal(twin.weight, model.weight)
    assert [str(each.pattern) for each in describe(f"{address}/net.safetensors") if each.pattern] == ["2:4"]
    files["/bent.safetensors"] = files["/net.safetensors"][:-1] + b"\0"
    with pytest.raises(ValueError, match=f"{address}/bent.safetensors: .*tensor 'weight.indices': .*CRC-32"):
        ow.load_state_dict(f"{address}/bent.safetensors")


def test_a_name_of_the_hub(served, model, tmp_path, monkeypatch):
    address, files, asked = served
    huggingface_hub = pytest.importorskip("huggingface_hub")
    importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files[f"/org/net/resolve/main/{FILE}"] = files["/net.safetensors"]
    assert torch.equal(ow.load_state_dict("hf://org/net")["weight"], model.weight)
    assert f"/org/net/resolve/main/{FILE}" in asked
    with pytest.raises(FileNotFoundError, match="hf://org/other: the Hub has no model of that name"):
        ow.load_state_dict("hf://org/other")


class Hub:
    """A huggingface_hub that knows one repository, which has no compressed file."""

    def __init__(self, folder):
        self.folder, self.errors = folder, self
        self.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
        self.RepositoryNotFoundError = type("RepositoryNotFoundError", (Exception,), {})

    def hf_hub_download(self, name, file, revision):
        raise self.EntryNotFoundError

    def snapshot_download(self, name, allow_patterns, revision):
        assert (name, allow_patterns, revision) == ("org/net", "model*.safetensors", "v1.0")
        return str(self.folder)


def test_a_repository_of_several_files_is_read_as_a_folder(tmp_path, model, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", hub)
    ow.save(model, tmp_path / "model.safetensors", pattern="2:4")
    assert torch.equal(ow.load_state_dict("hf://org/net@v1.0")["weight"], model.weight)


def test_a_hub_that_is_not_reached_says_so(tmp_path, monkeypatch):
    class Unreached(Hub):
        def __init__(self):
            super().__init__(tmp_path)
            self.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (self.EntryNotFoundError,), {})

        def hf_hub_download(self, name, file, revision):
            raise self.LocalEntryNotFoundError("cannot reach the Hub")

    hub = Unreached()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", hub)
    with pytest.raises(hub.LocalEntryNotFoundError, match="cannot reach the Hub"):
        ow.load_state_dict("hf://org/net")


@pytest.mark.parametrize("name", ["hf://net", "hf://a/b/c", "hf://", "hf://a/b@", "hf://a b/c", "HF://../x"])
def test_names_that_are_none_of_the_hub(name):
    with pytest.raises(ValueError, match="needed hf://owner/name or hf://owner/name@revision"):
        ow.load_state_dict(name)


def test_without_huggingface_hub_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf://org/net: .*pip install huggingface_hub"):
        ow.load_state_dict("hf://org/net")


# --- servers that lie, stall or lead astray -----------------------------------------------------------------------


class Misbehaving(BaseHTTPRequestHandler):
    """Answers with what its server's `answer` writes."""

    def do_GET(self):
        with contextlib.suppress(OSError):  # the reader went away
            self.server.answer(self)

    def log_message(self, *_): ...


@pytest.fixture
def misbehaving(monkeypatch, tmp_path):
    """(address, how to set the answer). Downloads go to an empty folder, which must be empty again afterwards."""
    (tmp_path / "downloads").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "downloads"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/net", functools.partial(setattr, server, "answer")
    server.shutdown()
    server.server_close()
    assert not list((tmp_path / "downloads").iterdir())


def answer(content: bytes, *, length: object = None, **headers: str):
    def send(handler):
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(content)

    return send


def test_bodies_that_are_not_as_declared(misbehaving, model, tmp_path):
    address, set_answer = misbehaving
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    content = (tmp_path / "net.safetensors").read_bytes()
    for good in (
        answer(content),  # without a length: until the server closes
        answer(content + b"more", length=len(content)),  # what comes after the body is none of it
        answer(content, length="many"),
    ):
        set_answer(good)
        assert torch.equal(ow.load_state_dict(address)["weight"], model.weight)
    for bad, error, complaint in (
        (answer(content, length=10**15), OSError, "could not be fetched: it has 10{15} bytes, half of the disk is"),
        (answer(content, length=10**30), OSError, "could not be fetched: it has 10{30} bytes"),
        (answer(content[:-9], length=len(content)), OSError, f"ended after {len(content) - 9} of {len(content)} bytes"),
        (answer(content + b"more", length=len(content) + 4), ValueError, "something was added"),
        (answer(content[:-9]), ValueError, "cut short"),
        (answer(b"5\r\nabc", Transfer_Encoding="chunked"), OSError, "could not be fetched"),
        (answer(b"zz\r\nabc", Transfer_Encoding="chunked"), OSError, "could not be fetched"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), OSError, "could not be fetched"),
        (lambda handler: handler.send_error(404), OSError, "could not be fetched: HTTP Error 404"),
        (lambda handler: handler.send_error(401), OSError, "could not be fetched: HTTP Error 401"),
    ):
        set_answer(bad)
        with pytest.raises(error, match=complaint):
            ow.load_state_dict(address)


def test_an_endless_body_stops_at_half_of_the_disk(misbehaving, monkeypatch):
    address, set_answer = misbehaving

    def endless(handler):
        answer(b"")(handler)
        while True:
            handler.wfile.write(bytes(1 << 16))

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
    set_answer(endless)
    with pytest.raises(OSError, match=r"it has more than \d+ bytes, half of the disk is 5242880: set TMPDIR"):
        ow.load_state_dict(address)


def test_slow_servers_are_given_up(misbehaving, monkeypatch):
    address, set_answer = misbehaving
    monkeypatch.setattr(download, "_PATIENCE", 0.3)
    gone = threading.Event()

    def silent(handler):
        gone.wait(60)

    def stalling(handler):
        answer(b"abc", length=100)(handler)
        gone.wait(60)

    def trickling(handler):
        answer(b"", length=10**6)(handler)
        while not gone.wait(0.05):
            handler.wfile.write(b"x")

    for each, complaint in ((silent, "timed out"), (stalling, "timed out"), (trickling, "which is too slow")):
        set_answer(each)
        with pytest.raises(OSError, match=f"could not be fetched: .*{complaint}"):
            ow.load_state_dict(address)
    gone.set()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/net", "data:,x"])
def test_redirections_stay_on_the_web(misbehaving, target):
    address, set_answer = misbehaving

    def elsewhere(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    set_answer(elsewhere)
    with pytest.raises(OSError, match=f"{address} could not be fetched: .*([lL]eads|Redirection) to .*{target}"):
        ow.load_state_dict(address)


def test_redirections_are_followed_but_not_from_https_to_http_nor_forever(misbehaving, model, tmp_path):
    address, set_answer = misbehaving
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")

    def elsewhere(handler):
        if handler.path == "/there":
            return answer((tmp_path / "net.safetensors").read_bytes())(handler)
        handler.send_response(302)
        handler.send_header("Location", "/there" if handler.path == "/net" else handler.path)
        return handler.end_headers()

    set_answer(elsewhere)
    assert torch.equal(ow.load_state_dict(address)["weight"], model.weight)
    with pytest.raises(OSError, match="infinite loop"):
        ow.load_state_dict(f"{address}/loop")
    request = urllib.request.Request("https://127.0.0.1/net")
    with pytest.raises(ValueError, match="only addresses of https are followed"):
        download.Redirects().redirect_request(request, None, 302, "", {}, "http://127.0.0.1/net")


def test_nobody_there(misbehaving, capsys):
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/net could not be fetched: .*[Cc]onnection refused"):
        ow.load_state_dict("http://127.0.0.1:1/net")
    assert main(["inspect", "http://127.0.0.1:1/net"]) == 2
    assert capsys.readouterr().err.startswith("openwork: http://127.0.0.1:1/net could not be fetched")


def test_paths_stay_paths(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    ow.save(model, "org/net", pattern="2:4")
    assert torch.equal(ow.load_state_dict("org/net")["weight"], model.weight)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory; .* hf://org/other: 'org/other'"):
        ow.load_state_dict("org/other")
    with pytest.raises(FileNotFoundError, match=r"org/other\.safetensors"):
        ow.load_state_dict("org/other.safetensors")
