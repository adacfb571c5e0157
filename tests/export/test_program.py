"""Programs of torch.export and packages of AOTInductor: run by a process that has none of the model's code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import openwork as ow
from openwork.export import program, to_aot_inductor, to_torch_export
from openwork.inference.layers import pack_layer
from openwork.layouts import Gemm, Gemv

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

RUN = """
import sys, torch
what, path, data = sys.argv[1:]
if "operator" in what:
    import openwork
load = {"export": lambda: torch.export.load(path).module(), "aot": lambda: torch._inductor.aoti_load_package(path)}
given = torch.load(data)
with torch.no_grad():
    found = load[what.split()[0]]()(given["x"])
assert given["model"] not in sys.modules
if "operator" not in what:
    assert "openwork" not in sys.modules
torch.testing.assert_close(found, given["y"])
print("equal")
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Deployed(nn.Module):
    """What `ow.deploy` makes where sparse is faster: a convolution and two layers, one for each kernel."""

    def __init__(self):
        super().__init__()
        plain = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 4)])
        ow.project(plain, "2:4")
        pattern, weight_dtype = ow.Pattern(2, 4), torch.float32
        self.conv = pack_layer(plain[0], pattern, Gemm, weight_dtype)
        self.up, self.down = (
            pack_layer(layer, pattern, kind, weight_dtype) for layer, kind in zip(plain[1:], (Gemm, Gemv), strict=True)
        )

    def forward(self, x):
        return self.down(self.up(self.conv(x).relu().mean((2, 3))))


def in_a_fresh_process(
    tmp_path, what: str, path, model: nn.Module, x: torch.Tensor
) -> subprocess.CompletedProcess[str]:
    with torch.no_grad():
        torch.save({"x": x, "y": model.eval()(x), "model": __name__}, tmp_path / "data.pt")
    arguments = [sys.executable, "-c", RUN, what, str(path), str(tmp_path / "data.pt")]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=900, check=False)


def test_a_program_runs_without_openwork(tmp_path):
    model, path = Net(), tmp_path / "net.pt2"
    ow.sparsify(model, "2:4")
    x = torch.randn(2, 8, 4, 4)
    assert to_torch_export(model, x, path, dynamic_shapes={"x": {0: Dim("batch")}}) < 1e-5
    assert ow.masks(model)  # the model goes on training
    done = in_a_fresh_process(tmp_path, "export", path, model, torch.randn(5, 8, 4, 4))
    assert done.stdout == "equal\n", done.stderr
    loaded = torch.export.load(path).module()
    ow.verify(loaded, pattern=ow.Selection("2:4", axis={"*": 1}))
    assert torch.equal(loaded.state_dict()["fc.weight"], ow.finalize(model).fc.weight)
    content = path.read_bytes()
    assert b"test_program.py" not in content
    assert x.numpy().tobytes() not in content


def test_a_deployed_model_is_exported_and_needs_the_import_of_its_operators(tmp_path):
    model, path, x = Deployed(), tmp_path / "net.pt2", torch.randn(3, 8, 4, 4)
    to_torch_export(model, x, path)
    done = in_a_fresh_process(tmp_path, "export operator", path, model, x)
    assert done.stdout == "equal\n", done.stderr
    done = in_a_fresh_process(tmp_path, "export", path, model, x)
    assert "openwork.gemm_conv2d" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_deployed_model_is_compiled_into_a_package(tmp_path):
    model, path, x = Deployed(), tmp_path / "net.pt2", torch.randn(3, 8, 4, 4)
    assert to_aot_inductor(model, x, path) < 1e-5
    done = in_a_fresh_process(tmp_path, "aot operator", path, model, x)
    assert done.stdout == "equal\n", done.stderr


def test_other_outputs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "outputs", lambda *_: [torch.zeros(2, 4)])
    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the exported program gives other outputs"):
        to_torch_export(nn.Linear(8, 4), torch.randn(2, 8), path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt2"]
