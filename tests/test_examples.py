"""The examples run."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import openwork as ow
from openwork.utils.torchvision_compat import ensure_torchvision

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_serve(tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    ensure_torchvision()
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50().eval()
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    monkeypatch.setenv("NET", str(tmp_path / "net.safetensors"))
    chosen = {name: "gemm" for name in ow.verify(model, pattern="2:4").sparse if not name.startswith("fc")}
    monkeypatch.setenv("CHOSEN", json.dumps(chosen))  # timing every layer would take long
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)

    class Request:
        async def body(self):
            return x.numpy().tobytes()

    x = torch.randn(serve.SHAPE)
    assert serve.model.deployment.chosen == chosen
    assert asyncio.run(serve.classify(Request())) == {"class": int(model(x).argmax())}
    (route,) = [each for each in serve.app.routes if each.path == "/classify"]
    assert route.methods == {"POST"}
