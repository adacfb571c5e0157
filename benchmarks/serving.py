"""Latency of examples/serve.py at batch 1, over HTTP on this machine, beside calls in this process: the same deployed
model, and the dense one.

    python benchmarks/serving.py [--requests 60]

A ResNet-50 with random weights at 2:4. Requests come one after the other and take turns with the calls. Medians, 5th
and 95th percentile in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import openwork as ow
from openwork.utils.torchvision_compat import ensure_torchvision

ensure_torchvision()

SERVE = Path(__file__).parent.parent / "examples" / "serve.py"
RUN = """
from openwork.utils.torchvision_compat import ensure_torchvision
import uvicorn
ensure_torchvision()
uvicorn.main()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(net: Path, chosen: object, port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    arguments = [sys.executable, "-c", RUN, "--app-dir", str(SERVE.parent), "serve:app"]
    arguments += ["--port", str(port), "--log-level", "warning"]
    server = subprocess.Popen(arguments, env={**os.environ, "NET": str(net), "CHOSEN": json.dumps(chosen)})
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return server
        except OSError:  # noqa: PERF203
            if server.poll() is not None:
                raise RuntimeError("the server ended: read its error above") from None
            time.sleep(0.1)
    raise TimeoutError("the server did not answer within a minute")


def spread(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=20)
    return f"{1e3 * statistics.median(seconds):.1f} ms [{1e3 * cuts[0]:.1f}, {1e3 * cuts[-1]:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=60)
    asked = parser.parse_args()
    from torchvision.models import resnet50

    model = resnet50().eval()
    ow.project(model, "2:4")
    x = torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        ow.save(model, Path(folder) / "net.safetensors", pattern="2:4")
        port = free_port()
        start = time.perf_counter()
        fast = ow.load_deployed(Path(folder) / "net.safetensors", model, x)
        deployment: Any = fast.deployment
        timed = time.perf_counter()
        ow.load_deployed(Path(folder) / "net.safetensors", model, x, chosen=deployment.chosen)
        print(f"deployed in {timed - start:.1f} s, every layer timed; {time.perf_counter() - timed:.1f} s as chosen")
        server = started(Path(folder) / "net.safetensors", deployment.chosen, port)
        address, body = f"http://127.0.0.1:{port}/classify", x.numpy().tobytes()

        def over_http() -> object:
            return urllib.request.urlopen(urllib.request.Request(address, data=body, method="POST")).read()

        def in_process(network: torch.nn.Module) -> object:
            with torch.inference_mode():
                return network(x).argmax()

        calls: dict[str, Callable[[], object]] = {
            "over HTTP": over_http,
            "in process": partial(in_process, fast),
            "in process, dense": partial(in_process, model),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        try:
            for call in calls.values():
                call()
            for _ in range(asked.requests):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
        finally:
            server.terminate()
            server.wait()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, each in times.items():
        print(f"{name}: {spread(each)}")


if __name__ == "__main__":
    main()
