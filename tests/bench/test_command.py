"""`openwork bench` on the command line: what it runs, prints and writes. On small shapes; the times mean nothing."""

from __future__ import annotations

import csv
import math
import sys
import types

import pytest
import torch
from in_process import InProcess
from torch import nn

import openwork as ow
from openwork.bench import command, forward, models, operators
from openwork.bench.measure import BenchRow, Roofline, alternating, quantile, rows, write_csv
from openwork.cli.main import main
from openwork.engines.engine import ENGINES
from openwork.kernels.cpu import native


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Small weights, a machine of known speed, and the threads as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(operators, "WEIGHT", (16, 64))
    monkeypatch.setattr(command, "SHAPES", ((32, 64, 48), (2, 64, 48)))
    monkeypatch.setattr(command, "roofline", lambda: Roofline(1e9, 1e9))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_operators(capsys):
    words = [
        "bench",
        "--patterns",
        "2:4",
        "1:8",
        "--threads",
        "2",
        "1",
        "1",
        "--seconds",
        "0",
        "--out",
        "deep/er/o.csv",
    ]
    assert main(words) == 0
    found = read("deep/er/o.csv")
    printed = capsys.readouterr().out
    assert f"{len(found)} rows: " in printed
    assert printed.count("sparse and dense layers in turn cost") == 2
    assert {row["threads"] for row in found} == {"1", "2"}
    masks = [row for row in found if row["op"] == "mask" and row["threads"] == "1" and row["pattern"] == "1:8"]
    expected = {"copy", "clone", "prune to new memory", "SR-STE term", "argsort"}
    expected |= {"prune"} if ow.kernels.status().isa else set()
    assert {row["impl"] for row in masks} == expected
    assert {row["shape"] for row in masks} == {"16x64"}
    linear = [row for row in found if row["op"] == "linear" and row["threads"] == "1"]
    assert {row["shape"] for row in linear} == {"B=32 K=64 O=48", "B=2 K=64 O=48"}
    few = {row["impl"] for row in linear if row["shape"].startswith("B=2 ")}
    assert {f"gemv {p} {d}" for p in ("2:4", "1:8") for d in ("float32", "bfloat16", "int8")} <= few
    assert "torch bfloat16" in few
    assert not any(name.startswith("gemm") for name in few)
    for row in found:
        times = [float(row[name]) for name in ("p20_us", "p50_us", "p80_us")]
        assert times == sorted(times)
        assert float(row["ratio"]) == pytest.approx(float(row["baseline_p50_us"]) / times[1], rel=1e-4)
        assert row["torch"] == torch.__version__
        assert row["isa"] == str(ow.kernels.status().isa or "none")
    bytes_moved = next(row for row in masks if row["impl"] == "SR-STE term")
    assert float(bytes_moved["bound_us"]) == pytest.approx(3 * 4 * 16 * 64 / 1e9 * 1e6)


def test_growth_has_its_series_in_float32(monkeypatch):
    monkeypatch.setattr(command, "GROWTH", {"batch": [(1, 64, 64), (8, 64, 64)], "width": [(8, 32, 32), (8, 64, 64)]})
    assert main(["bench", "growth", "--patterns", "2:4", "--threads", "1", "--seconds", "0"]) == 0
    found = read("bench.csv")
    assert {(row["op"], row["shape"]) for row in found} == {
        ("growth with batch", "B=1 K=64 O=64"),
        ("growth with batch", "B=8 K=64 O=64"),
        ("growth with width", "B=8 K=32 O=32"),
        ("growth with width", "B=8 K=64 O=64"),
    }
    assert {(row["pattern"], row["dtype"]) for row in found if row["pattern"] != "dense"} == {("2:4", "float32")}


def test_without_the_library_nothing_is_timed_that_does_nothing(monkeypatch):
    monkeypatch.setattr(native, "_open", lambda: (None, "a test hides it"))
    assert main(["bench", "masks", "--patterns", "2:4", "--threads", "1", "--seconds", "0"]) == 0
    assert "prune" not in {row["impl"] for row in read("bench.csv")}


TORCH = ("--engines", "eager", "channels_last")


def test_whole_models(monkeypatch, capsys):
    def net():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(net=net))
    monkeypatch.setattr(models, "memory", lambda model, example: (1_000_000, 2_000_000))
    monkeypatch.setattr(forward, "Worker", InProcess)
    words = [
        "bench",
        "made:net",
        "--input",
        "1x8x6x6",
        "--patterns",
        "2:4",
        "--batches",
        "1",
        "2",
        "--threads",
        "1",
        "--seconds",
        "0",
        "--no-compile",
    ]
    assert main([*words, *TORCH, "--memory", "--precision", "float32", "int8"]) == 0
    found = read("bench.csv")
    assert [(row["op"], row["shape"]) for row in found] == [("made:net", "batch 1")] * 4 + [("made:net", "batch 2")] * 4
    assert [row["impl"] for row in found[:4]] == [
        "dense eager",
        "dense channels_last",
        "deployed 2:4 float32",
        "deployed 2:4 int8",
    ]
    assert {row["baseline"] for row in found} <= {"dense eager", "dense channels_last"}
    assert [row["held_bytes"] for row in found[:4]] == ["1000000", "nan", "1000000", "1000000"]
    printed = capsys.readouterr().out
    assert printed.count("of 1 weight sparse\n") == 4
    assert printed.count("1.0, +2.0") == 6


def test_whole_models_in_bfloat16_and_with_torchs_int8(monkeypatch):
    monkeypatch.setattr(forward, "Worker", InProcess)
    made = types.SimpleNamespace(net=lambda: nn.Sequential(nn.Linear(32, 16)))
    monkeypatch.setitem(sys.modules, "made", made)
    words = ["bench", "made:net", "--input", "1x4x32", "--patterns", "2:4", "--batches", "1"]
    words += ["--threads", "1", "--seconds", "0", "--no-compile", *TORCH]
    assert main([*words, "--precision", "bfloat16"]) == 0
    found = {row["impl"]: row for row in read("bench.csv")}
    assert set(found) == {"dense eager bfloat16", "deployed 2:4 bfloat16"}
    assert {row["dtype"] for row in found.values()} == {"bfloat16"}
    assert main([*words, "--precision", "float32", "int8"]) == 0
    found = {row["impl"]: row for row in read("bench.csv")}
    assert set(found) == {"dense eager", "deployed 2:4 float32", "dense eager int8", "deployed 2:4 int8"}
    assert found["deployed 2:4 float32"]["baseline"] == "dense eager"  # int8 rounds more
    assert found["dense eager"]["difference"] == "0"
    assert 0 < float(found["dense eager int8"]["difference"]) < 0.05
    assert found["dense eager"]["engine"] == f"torch {torch.__version__}"
    assert found["deployed 2:4 int8"]["engine"] == f"openwork {ow.__version__}"


def test_engines_that_are_not_there_are_said_and_others_measured(monkeypatch, capsys):
    monkeypatch.setattr(forward, "Worker", InProcess)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(net=lambda: nn.Sequential(nn.Linear(32, 16))))
    words = ["bench", "made:net", "--input", "4x32", "--patterns", "2:4", "--batches", "1", "--threads", "1"]
    assert main([*words, "--seconds", "0", "--no-compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "made:net, batch 1: OpenVINO is not installed: pip install openvino onnx onnxscript" in lines
    assert "made:net, batch 1: ONNX Runtime is not installed: pip install onnxruntime onnx onnxscript" in lines
    assert "made:net, batch 1: dense channels_last: for networks with Conv2d, and this has none" in lines
    assert [row["impl"] for row in read("bench.csv")] == ["dense eager", "deployed 2:4 float32"]


@pytest.mark.slow
def test_every_engine_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Of a class in the current folder, as a user would have it."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))\n"
    )
    words = ["bench", "mine:Net", "--input", "4x32", "--patterns", "2:4", "--batches", "1", "--threads", "1"]
    assert main([*words, "--seconds", "0", "--no-compile"]) == 0
    found = {row["impl"]: row for row in read("bench.csv")}
    installed = [each.name for each in ENGINES if each.reads_onnx and not each.missing()]
    assert {*found} == {"dense eager", "deployed 2:4 float32", *(f"dense {name}" for name in installed)}
    assert all(float(row["difference"]) < 1e-5 for row in found.values())
    assert [found[f"dense {name}"]["engine"].rpartition(" ")[0] for name in installed] == installed


def test_mistakes_are_told_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(forward, "Worker", None)
    assert main(["bench", "resnet50", "--engines", "TensorRT"]) == 2
    assert "there is no engine TensorRT; needed some of eager, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "resnet50", "--precision", "float64"])
    assert "--precision: invalid choice: 'float64'" in capsys.readouterr().err


class Said:
    """A worker that says what it measured."""

    version, difference = "made 1.0", {"": 0.25}


def entry(impl, pattern, precision):
    return forward.Entry(impl, pattern, precision, Said())


def test_dense_is_the_fastest_engine_that_rounds_no_more():
    entries = [entry("dense eager", "dense", "float32"), entry("dense OpenVINO", "dense", "float32")]
    entries += [entry("dense OpenVINO int8", "dense", "int8")]
    entries += [entry("deployed 2:4 float32", "2:4", "float32"), entry("deployed 2:4 int8", "2:4", "int8")]
    times = {
        "dense eager": [[8.0], [8.0], [9.0]],
        "dense OpenVINO": [[4.0], [4.0], [6.0]],
        "dense OpenVINO int8": [[1.0, 1.2], [1.0], [1.0]],
        "deployed 2:4 float32": [[2.0], [4.0], [2.0]],
        "deployed 2:4 int8": [[2.0], [2.0], [2.0]],
    }
    job = forward.Job("net", "batch 1", nn.Identity(), None, [], ["float32", "int8"])
    found = {row.impl: row for row in forward.as_rows(job, entries, times)}
    assert list(found) == [
        "dense eager",
        "dense OpenVINO",
        "deployed 2:4 float32",
        "dense OpenVINO int8",
        "deployed 2:4 int8",
    ]
    assert {name: row.baseline for name, row in found.items()} == {
        "dense eager": "dense OpenVINO",
        "dense OpenVINO": "dense OpenVINO",
        "deployed 2:4 float32": "dense OpenVINO",
        "dense OpenVINO int8": "dense OpenVINO int8",
        "deployed 2:4 int8": "dense OpenVINO int8",
    }
    fast = found["deployed 2:4 float32"]
    assert (fast.ratio, fast.ratio_p20, fast.ratio_p80) == (2.0, 1.0, 3.0)  # round by round: 2, 1 and 3
    assert (fast.engine, fast.difference) == ("made 1.0", 0.25)
    slow = {**times, "dense OpenVINO int8": [[5.0], [5.0], [5.0]]}
    rows = {row.impl: row.baseline for row in forward.as_rows(job, entries, slow)}
    assert rows["deployed 2:4 int8"] == "dense OpenVINO"  # an int8 engine that loses to float32 is no baseline
    with pytest.raises(ValueError, match="no engine runs net dense in float32"):
        list(forward.as_rows(job, entries[2:], slow))


def test_each_precision_is_compared_with_those_that_round_no_more():
    rows = list(operators.time_linear(Roofline(1e9, 1e9), [(8, 64, 48)], [ow.Pattern(2, 4)], 0))
    assert {row.baseline.split()[1] for row in rows if row.dtype == "float32"} == {"float32"}
    assert {row.baseline.split()[1] for row in rows if row.dtype == "bfloat16"} <= {"float32", "bfloat16"}
    assert [row.impl for row in rows if row.dtype == "float32"][:2] == ["torch float32", "oneDNN float32"]
    names = [row.impl for row in rows]
    assert len(names) == len(set(names))
    assert any("dot_product" in name for name in names) == ow.kernels.vectors().dot_product


@pytest.mark.slow
def test_memory_of_a_model_in_a_process_of_its_own():
    held, grown = models.memory(nn.Linear(1024, 4096), torch.randn(1, 1024))
    assert held == 4 * (1024 * 4096 + 4096)
    assert grown > 0.9 * held


# --- measuring --------------------------------------------------------------------------------------------------------


def test_rows_compare_with_the_fastest_baseline():
    times = {"a": [1.0, 2.0, 3.0], "b": [4.0, 4.0, 4.0], "fast": [0.5, 0.5, 1.0]}
    found = rows("op", "shape", times, ["a", "b"], {"fast": ("2:4", "int8")}, {"fast": 0.25})
    assert all(isinstance(each, BenchRow) for each in found)
    fast = found[-1]
    assert (fast.baseline, fast.baseline_p50_us, fast.ratio) == ("a", 2e6, 4.0)
    assert (fast.pattern, fast.dtype, fast.bound_us, fast.roofline) == ("2:4", "int8", 0.25e6, 0.5)
    assert (found[0].pattern, found[0].dtype) == ("dense", "float32")
    assert math.isnan(found[0].roofline)
    assert (found[0].p20_us, found[0].p50_us, found[0].p80_us) == (1e6, 2e6, 3e6)


def test_variants_take_turns():
    ran = []
    times = alternating({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, seconds=0, flush=False)
    assert ran == ["a", "b"] * 7  # once to warm up, once to see how long they take, five rounds
    assert {name: len(each) for name, each in times.items()} == {"a": 5, "b": 5}


def test_quantiles():
    assert [quantile([5.0, 1.0, 2.0, 4.0, 3.0], share) for share in (0, 0.2, 0.5, 0.8, 1)] == [1, 2, 3, 4, 5]


def test_bounds():
    assert Roofline(flops=100.0, bandwidth=10.0).bound(200, 10) == 2
    assert Roofline(flops=100.0, bandwidth=10.0).bound(200, 50) == 5


def test_csv_replaces_the_file(tmp_path):
    write_csv(tmp_path / "a.csv", BenchRow, rows("op", "s", {"a": [1.0]}, ["a"], {}, {}))
    write_csv(tmp_path / "a.csv", BenchRow, [])
    assert (tmp_path / "a.csv").read_text().startswith("op,shape,pattern,dtype,impl,p20_us,p50_us,p80_us,baseline,")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1
