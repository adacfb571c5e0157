"""The examples run."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import runpy
import subprocess
import sys
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


# File -> what it needs, and the compressed file that it writes.
SCRIPTS = {
    "plain_loop": ("sklearn", "digits.safetensors"),
    "lightning_trainer": ("lightning", "checkpoints/model.openwork.safetensors"),
    "hf_trainer": ("transformers", "out/model.openwork.safetensors"),
    "accelerate_loop": ("accelerate", "out/model.openwork.safetensors"),
    "diffusion": ("torch", "denoiser.safetensors"),
    "lora": ("peft", "base.safetensors"),
}


OF_MODELS = {"classify", "detect", "translate"}  # run by test_trained_examples.py
QUICK = {"plain_loop", "accelerate_loop"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_a_script_runs(name, tmp_path, monkeypatch):
    needed, file = SCRIPTS[name]
    pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ow.load_state_dict(file)


@pytest.mark.slow
def test_fsdp2_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, EXAMPLES / "fsdp2.py"], check=True, cwd=tmp_path, timeout=300)
    assert ow.load_state_dict(tmp_path / "fsdp2.safetensors")


def test_no_example_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *OF_MODELS, "fsdp2", "serve"}
    for path in EXAMPLES.glob("*.py"):
        assert 30 <= len(path.read_text(encoding="utf-8").splitlines()) <= 65
