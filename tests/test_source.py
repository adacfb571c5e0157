"""Addresses and names of the Hub, against a server in this process."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.checkpoint import describe
from openwork.contents import FILE


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
    assert torch.equal(ow.load(f"{address}/net.safetensors")["weight"], model.weight)
    twin = ow.load(f"{address}/net.safetensors", into=nn.Linear(8, 4))
    assert torch.equal(twin.weight, model.weight)
    assert [str(each.pattern) for each in describe(f"{address}/net.safetensors") if each.pattern] == ["2:4"]
    files["/bent.safetensors"] = files["/net.safetensors"][:-1] + b"\0"
    with pytest.raises(ValueError, match="not ascending"):
        ow.load(f"{address}/bent.safetensors")


def test_a_name_of_the_hub(served, model, tmp_path, monkeypatch):
    address, files, asked = served
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files[f"/org/net/resolve/main/{FILE}"] = files["/net.safetensors"]
    assert torch.equal(ow.load("org/net")["weight"], model.weight)
    assert f"/org/net/resolve/main/{FILE}" in asked
    with pytest.raises(FileNotFoundError, match="no file org/other here, and no model of that name"):
        ow.load("org/other")


class Hub:
    """A huggingface_hub that knows one repository, which has no compressed file."""

    def __init__(self, folder):
        self.folder, self.errors = folder, self
        self.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
        self.RepositoryNotFoundError = type("RepositoryNotFoundError", (Exception,), {})

    def hf_hub_download(self, name, file):
        raise self.EntryNotFoundError

    def snapshot_download(self, name, allow_patterns):
        assert (name, allow_patterns) == ("org/net", "model*.safetensors")
        return str(self.folder)


def test_a_repository_of_several_files_is_read_as_a_folder(tmp_path, model, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", hub)
    ow.save(model, tmp_path / "model.safetensors", pattern="2:4")
    assert torch.equal(ow.load("org/net")["weight"], model.weight)


@pytest.mark.parametrize("name", ["http://127.0.0.1:1/net.safetensors", "org/net"])
def test_without_huggingface_hub_it_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        ow.load(name)


def test_paths_stay_paths(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    ow.save(model, "org/net", pattern="2:4")
    assert torch.equal(ow.load("org/net")["weight"], model.weight)
    with pytest.raises(FileNotFoundError, match=r"org/other\.safetensors"):
        ow.load("org/other.safetensors")
