"""The examples run."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch

import openwork as ow
from openwork.tasks.torchvision_compat import ensure_torchvision

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_serve(tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    ensure_torchvision()
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50().eval()
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    monkeypatch.setenv("NET", str(tmp_path / "net.safetensors"))
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)

    class Request:
        async def body(self):
            return x.numpy().tobytes()

    x = torch.randn(serve.SHAPE)
    assert asyncio.run(serve.classify(Request())) == {"class": int(model(x).argmax())}
    (route,) = [each for each in serve.app.routes if each.path == "/classify"]
    assert route.methods == {"POST"}
