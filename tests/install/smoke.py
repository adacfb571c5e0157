"""What must work after `pip install openwork`, with torch, numpy and safetensors alone.

Run it outside of the source. `python smoke.py native` also demands the native kernels, `python smoke.py slow` that they
are missing and that it is said.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import openwork as ow


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32))


def main(kernels: str, folder: Path) -> None:
    print(ow.__file__, ow.kernels.status())
    assert Path(ow.__file__).is_relative_to(sys.prefix), "not the installed package"
    assert bool(ow.kernels.status().isa) == (kernels == "native")

    torch.manual_seed(0)
    model, example = network(), torch.randn(4, 8, 8, 8)
    ow.sparsify(model, "2:4", ow.SRSTE())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ow.attach(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
    print(ow.verify(model, example))

    file = folder / "net.safetensors"
    ow.save(model, file)
    expected = ow.finalize(model).eval()(example)
    loaded = ow.load(file, into=network()).eval()
    assert torch.equal(loaded(example), expected)
    fast = ow.deploy(loaded, example)
    torch.testing.assert_close(fast(example), expected, rtol=1e-4, atol=1e-5)
    print(fast.deployment)

    openwork = Path(sys.executable).with_name("openwork")
    for words in (
        ["--help"],
        ["inspect", file],
        ["verify", file],
        ["export", file, "--out", folder / "dense.safetensors"],
    ):
        done = subprocess.run([openwork, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        main(sys.argv[1], Path(path))
