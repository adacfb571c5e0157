"""Engines: each gives torch's outputs, what is not there or not possible is said, processes take turns."""

from __future__ import annotations

import importlib.util
import os
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from openwork.engines import onnx_engines, onnx_files, torch_engines
from openwork.engines.case import Case, Refused, floats, write_module, write_program
from openwork.engines.engine import ENGINES, engines_named
from openwork.engines.worker import Worker, in_rounds, medians, timed
from openwork.utils.difference import largest_difference

IMAGES = torch.randn(2, 3, 12, 12)


class Net(nn.Module):
    """A convolution with its normalization, a residual addition, and a linear layer; two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, images: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.norm(self.first(images)))
        x = x + self.second(x)
        return {"logits": self.head(x.mean((2, 3))) * factor, "chosen": x.argmax(1)}


EXAMPLE = {"factor": torch.tensor([[2.0], [1.0]]), "images": IMAGES}  # not in the order of the signature


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The case of a small network, with the files of other engines where they are installed."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("case"), Net().eval()
    write_module(folder, model, EXAMPLE)
    calibration = [EXAMPLE, {"factor": torch.ones(2, 1), "images": torch.randn(2, 3, 12, 12)}]
    write_program(folder, model, EXAMPLE, calibration)
    if importlib.util.find_spec("onnxscript"):
        onnx_files.write_onnx(Case(folder, "int8"))
    return folder


def apart(case, prepared):
    """How far outputs are from torch's in float32."""
    with torch.inference_mode():
        return largest_difference(case.expected(), floats(prepared.calls[""]()))


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("engine", [torch_engines.eager, torch_engines.channels_last])
def test_torch_gives_the_same(engine, precision, most, folder):
    case = Case(folder, precision)
    prepared = engine(case)
    assert apart(case, prepared) < most
    assert prepared.version == f"torch {torch.__version__}"


@pytest.mark.slow
def test_compiled_gives_the_same(folder):
    assert apart(Case(folder), torch_engines.compiled(Case(folder))) < 1e-5


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), ("bfloat16", 3e-2), ("int8", 0.1)])
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_other_engines_give_the_same(name, precision, most, folder):
    for package in (name, "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    case = Case(folder, precision)
    if precision not in next(each.precisions for each in ENGINES if each.prepare.endswith(f":{name}")):
        return
    try:
        prepared = getattr(onnx_engines, name)(case)
    except Refused as refusal:
        assert precision == "bfloat16"
        assert "no bfloat16 on" in str(refusal)  # noqa: PT017
        return
    assert apart(case, prepared) < most
    assert (apart(case, prepared) > 1e-5) == (precision != "float32")  # it did what was asked


def test_dynamic_int8_is_for_linear_layers(folder, tmp_path):
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no int8 products")
    with pytest.raises(Refused, match="linear layers"):
        torch_engines.eager(Case(folder, "int8"))
    write_module(tmp_path, nn.Sequential(nn.Linear(32, 16)).eval(), torch.randn(4, 32))
    assert 0 < apart(Case(tmp_path, "int8"), torch_engines.eager(Case(tmp_path, "int8"))) < 0.05
    with pytest.raises(Refused, match="has none"):
        torch_engines.channels_last(Case(tmp_path))


def test_what_cannot_be_quantized_has_its_reason(folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("program.pt2", "inputs.pt", "calibration.pt", "expected.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(onnx_files, "_MOST", 10)
    onnx_files.write_onnx(Case(tmp_path, "int8"))
    with pytest.raises(Refused, match=r"int8: 0\.0 GB of weights do not fit"):
        onnx_engines.onnxruntime(Case(tmp_path, "int8"))
    assert apart(Case(tmp_path), onnx_engines.onnxruntime(Case(tmp_path))) < 1e-5  # weights in a second file


def test_what_torch_export_does_not_take_is_refused(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(Refused, match=r"torch.export does not take the network \("):
        write_program(tmp_path, Branches(), torch.ones(2))


def test_an_engine_that_is_not_installed_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openvino", "onnx") else "there")
    assert [engine.missing() for engine in ENGINES] == [
        "",
        "",
        "",
        "OpenVINO is not installed: pip install openvino onnx",
        "ONNX Runtime is not installed: pip install onnx",
    ]


def test_an_unknown_engine_is_an_error():
    with pytest.raises(ValueError, match="no engine TensorRT; needed some of eager, channels_last, compiled, OpenVINO"):
        engines_named(["eager", "TensorRT"])


# --- in processes ---------------------------------------------------------------------------------------------------

MADE = """
    import os, sys, time
    import torch
    from openwork.engines.case import Prepared, Refused

    def good(case):
        print("libraries print")
        x = torch.tensor([2.0])
        about = {"pid": os.getpid(), "threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"]}
        return Prepared({"": lambda: x, "off": lambda: [1.5 * x]}, "made 1.0", about)

    def refuses(case):
        raise Refused("has no " + case.precision)

    def dies(case):
        print("the last words", file=sys.stderr)
        os._exit(3)

    def sleeps(case):
        time.sleep(60)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder on the path with `made.py`, and a case."""
    (tmp_path / "made.py").write_text(textwrap.dedent(MADE))
    torch.save([torch.tensor([2.0])], tmp_path / "expected.pt")
    monkeypatch.syspath_prepend(str(tmp_path))
    return Case(tmp_path, "int8", threads=2)


@pytest.mark.slow
def test_a_process_of_its_own(made):
    with Worker("made:good", made) as worker:
        assert worker.difference == {"": 0.0, "off": 0.5}
        assert (worker.version, worker.names) == ("made 1.0", ["", "off"])
        assert worker.about["pid"] != os.getpid()
        assert (worker.about["threads"], worker.about["omp"]) == (2, "2")
        assert len(worker.turn("", 0.0)) == 1
        assert sum(worker.turn("off", 0.05)) == pytest.approx(0.05, rel=0.5)
    assert worker._process.poll() is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("refuses", "has no int8"),
        ("dies", "its process ended with status 3: the last words"),
    ],
)
def test_what_a_process_cannot_is_told(made, function, said):
    with pytest.raises(Refused) as found:
        Worker(f"made:{function}", made)
    assert said in str(found.value)


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended(made):
    start = time.monotonic()
    with pytest.raises(Refused, match="took longer than it was given"):
        Worker("made:sleeps", made, seconds=0.5)
    assert time.monotonic() - start < 10


def test_a_case_survives_the_way_to_its_process(tmp_path):
    case = Case(tmp_path, "int8", 3, {"pattern": "2:4"})
    assert Case.of_json(case.to_json()) == case
    assert isinstance(case.folder, Path)


# --- turns ----------------------------------------------------------------------------------------------------------


def test_all_take_their_turn_in_every_round():
    ran = []

    def turn(name):
        return lambda seconds: ran.append((name, seconds)) or [float(len(ran)), 0.5]

    times = in_rounds({"a": turn("a"), "b": turn("b")}, seconds=6.0, rounds=3)
    assert ran == [("a", 2.0), ("b", 2.0)] * 3
    assert times == {"a": [[1.0, 0.5], [3.0, 0.5], [5.0, 0.5]], "b": [[2.0, 0.5], [4.0, 0.5], [6.0, 0.5]]}
    assert medians(times) == {"a": 1.0, "b": 2.0}


def test_the_first_run_is_not_counted():
    ran = []
    assert len(timed(lambda: ran.append(1), 0.0)) == 1
    assert len(ran) == 2
