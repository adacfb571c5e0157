"""benchmarks/gpu.py where there is no GPU: its arguments, its errors, its tables, a rehearsal of every section, and
whether its checks find what they look for."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import openwork as ow
from openwork.cli.plan import plan
from openwork.inference.layers import PackedLinear
from openwork.kernels.cuda import cusparselt
from openwork.layouts import Gemm
from openwork.layouts.layout import KINDS
from openwork.layouts.skinny import Skinny

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_tables  # noqa: E402

CPU = torch.device("cpu")
TINY = gpu.Bench(CPU, rounds=1, tiny=True)


def test_without_a_gpu_it_says_so(capsys: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["masks", "--out", str(tmp_path / "gpu")]) == 2
    assert f"no CUDA GPU: torch {torch.__version__} sees none; --rehearse and --tables" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_section_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["mask"])
    assert "no section 'mask'; there are check, masks" in capsys.readouterr().err


def test_a_plan_for_a_gpu_needs_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=rf"--device cuda: torch {re.escape(torch.__version__)} sees no GPU here"):
        plan(["encoder", "--device", "cuda"])


def test_it_is_a_script() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--help"]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=True, cwd=ROOT, env=here)
    assert "masks, lists, linear, decode, models, training" in done.stdout


def test_a_rehearsal_runs_every_section_and_fills_every_table(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    small = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    monkeypatch.setattr(gpu, "resnet", lambda: nn.Sequential(*copy.deepcopy(small)))
    out = ["--out", str(tmp_path / "gpu")]
    assert gpu.main(["--rehearse", *out]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("rehearsal on a CPU; torch ")
    assert all(f"{kind}: " in printed for kind in gpu_check.CHECKS)
    assert "masks: 270 checks passed\n" in printed
    assert "  not here: CUDA graphs: this is a CPU\n" in printed
    assert "skipped" not in printed
    rows = written(tmp_path / "gpu.csv")
    assert {row["section"] for row in rows} == set(gpu.SECTIONS) - {"check"}
    assert [row["impl"] for row in rows] == [row["impl"] for row in json.loads((tmp_path / "gpu.json").read_text())]
    page = tmp_path / "performance.md"
    page.write_text(gpu_tables.PAGE.read_text())
    assert gpu.main(["--tables", str(tmp_path / "gpu.csv"), "--page", str(page)]) == 0
    for name, made in gpu_tables.TABLES.items():
        part = page.read_text().split(f"<!-- gpu {name} -->")[1].split("<!-- end -->")[0]
        assert made([row for row in rows if row["section"] == name]) in part
        assert gpu_tables.NONE not in part


def written(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def row(**fields: Any) -> dict[str, str]:
    given = {"section": "masks", "shape": "8192x8192", "pattern": "2:4", "dtype": "bfloat16", "note": "", "share": 0.0}
    given |= {"p20_us": 9.0, "p50_us": 10.0, "p80_us": 12.0, "baseline": "copy", "ratio": 1.0}
    return {name: str(value) for name, value in {**given, **fields}.items()}


def test_tables_say_what_was_measured() -> None:
    shares = {"copy": 1.0, "prune": 0.91, "mask": 0.83, "SR-STE term": 0.874, "reference": ""}
    rows = [row(impl=name, share=share, note="4000 GB/s" if name == "copy" else "") for name, share in shares.items()]
    rows[-1]["p50_us"] = "455"
    assert gpu_tables.masks(rows).splitlines()[2] == "| 2:4 | bfloat16 | 4000 GB/s | 0.91 | 0.83 | 0.87 | 46 |"
    step = row(section="training", shape="gpt2", impl="SR-STE", ratio=0.98)
    assert gpu_tables.training([step]).splitlines()[2] == "| gpt2 | SR-STE | 10.0 [9.0, 12.0] | 1.020 |"
    assert "x1.00 of copy  91% of copy" in gpu_tables.line(rows[1])
    failed = [each for each in rows if each["impl"] not in ("prune", "reference")]
    assert gpu_tables.masks(failed).splitlines()[2] == "| 2:4 | bfloat16 | 4000 GB/s | - | 0.83 | 0.87 | - |"


def test_a_page_without_the_place_is_refused(tmp_path: Path) -> None:
    file, page = tmp_path / "gpu.csv", tmp_path / "page.md"
    file.write_text(
        "section,case,gpu,versions,date,shape,impl,p20_us,p50_us,p80_us,ratio\ntraining,c,g,v,d,s,i,1,1,1,1\n"
    )
    page.write_text("<!-- gpu masks -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="has no line <!-- gpu training -->"):
        gpu_tables.write([file], page)


def test_shapes_of_resnet50() -> None:
    shapes = gpu.resnet50_shapes()
    assert len(shapes) == 53
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_493_504  # 25.5 M less the stem and what has one dim


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_call_is_launched_while_the_gpu_waits(monkeypatch: Any) -> None:
    seen: list[str] = []
    names = iter(["start", "stop"])

    def event(enable_timing: bool) -> Any:
        name = next(names)
        return SimpleNamespace(record=lambda: seen.append(name), synchronize=lambda: None, elapsed_time=lambda _: 2.0)

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("idle"))
    bench = gpu.Bench(torch.device("cuda"), rounds=1, tiny=False)
    assert bench._timed(lambda: seen.append("call"), launched=True)() == 2e-3
    assert seen == ["sleep", "start", "call", "stop"]
    seen.clear()
    names = iter(["start", "stop"])
    bench._timed(lambda: seen.append("call"), launched=False)
    assert seen == ["idle", "start", "call", "stop"]


def test_slow_variants_run_less_often(monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 0.02)
    bench = gpu.Bench(CPU, rounds=20, tiny=True)
    times = bench.times({"fast": lambda: None, "slow": partial(time.sleep, 0.01)})
    assert {name: len(each) for name, each in times.items()} == {"fast": 20, "slow": gpu.LEAST}


def test_when_time_is_up_it_says_what_it_skipped(tmp_path: Path, capsys: Any) -> None:
    words = ["--rehearse", "--minutes", "0", "--out", str(tmp_path / "gpu")]
    assert gpu.main(["lists", "masks", *words]) == 0
    lines = [each for each in capsys.readouterr().out.splitlines() if " took 0 s" not in each][1:]
    assert lines[:2] == [f"skipped, no time was left: lists: {each}" for each in ("prune", "SR-STE term")]
    assert lines[2:] == [f"skipped, no time was left: masks: {each}" for each in gpu.mask_kernels(TINY)]
    assert list(tmp_path.iterdir()) == []
    assert gpu.main(["check", *words]) == 1  # nobody should take it for passed


# --- failures --------------------------------------------------------------------------------------------------------


def broken() -> list[gpu.Row]:
    raise RuntimeError("CUDA out of memory")


def test_what_fails_costs_nothing_else(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    whole = gpu.lists(TINY)
    monkeypatch.setitem(gpu.RUNS, "lists", lambda _: {"broken": broken, **whole})  # type: ignore[index]
    assert gpu.main(["lists", "linear", "--rehearse", "--out", str(tmp_path / "gpu")]) == 1
    found = [(row["section"], row["case"]) for row in written(tmp_path / "gpu.csv")]
    assert list(dict.fromkeys(found)) == [("lists", each) for each in whole] + [
        ("linear", each) for each in gpu.linear(TINY)
    ]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "FAILED: lists: broken: RuntimeError: CUDA out of memory"
    assert 'raise RuntimeError("CUDA out of memory")' in printed.err  # the traceback


def test_a_variant_that_fails_costs_no_other(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "dense_int8", lambda x, layer: {"dense int8": broken})
    assert gpu.main(["linear", "--rehearse", "--out", str(tmp_path / "gpu")]) == 1
    assert [(row["impl"], row["dtype"]) for row in written(tmp_path / "gpu.csv")] == [
        ("dense", "bfloat16"),
        ("dense", "float16"),
    ]
    failed = [each for each in capsys.readouterr().out.splitlines() if each.startswith("FAILED")]
    assert failed == ["FAILED: linear: 64,64,64 bfloat16: dense int8: RuntimeError: CUDA out of memory"]


def test_what_was_measured_is_written_before_the_next_case(tmp_path: Path, monkeypatch: Any) -> None:
    def killed() -> list[gpu.Row]:
        raise KeyboardInterrupt

    whole = gpu.lists(TINY)
    monkeypatch.setitem(gpu.RUNS, "lists", lambda _: {"prune": whole["prune"], "killed": killed})  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["lists", "--rehearse", "--out", str(tmp_path / "gpu")])
    assert [row["case"] for row in written(tmp_path / "gpu.csv")] == ["prune", "prune"]


def test_nothing_runs_on_a_gpu_that_takes_nothing_more(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(gpu.RUNS, "lists", lambda _: {"broken": broken, **gpu.lists(TINY)})  # type: ignore[index]
    monkeypatch.setattr(gpu_check, "lost", lambda device: True)
    assert gpu.main(["lists", "--rehearse", "--out", str(tmp_path / "gpu")]) == 1
    assert "skipped, the GPU takes nothing more: lists: prune\n" in capsys.readouterr().out


def test_without_torchvision_only_resnet_is_missing(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def missing() -> Any:
        raise ImportError("torchvision is missing")

    monkeypatch.setattr("openwork.utils.torchvision_compat.ensure_torchvision", missing)
    assert gpu.main(["training", "--rehearse", "--out", str(tmp_path / "gpu")]) == 0
    assert "not here: training: resnet50: torchvision is missing\n" in capsys.readouterr().out
    assert {row["shape"] for row in written(tmp_path / "gpu.csv")} == {"gpt2"}


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: Any, tmp_path: Path) -> dict[str, Any]:
    """cuSPARSELt's place is taken by a dense product. What it returns can be changed: its functions."""
    changed: dict[str, Any] = {"pack": lambda weight: (weight, None), "product": plain_product}
    here = dataclasses.replace(
        cusparselt.BACKENDS["cusparselt"],
        pack=lambda weight: changed["pack"](weight),
        product=lambda *given: changed["product"](*given),
        search=lambda *_: (7, 2, 1),
        missing=lambda _: "",
        version=lambda: "plain torch",
    )
    monkeypatch.setitem(cusparselt.BACKENDS, "cusparselt", here)
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    return changed


def plain_product(x: Tensor, packed: Tensor, _: None, bias: Any, outputs: int, algorithm: Any, out: Any) -> Tensor:
    return F.linear(x.double(), packed.double(), None if bias is None else bias.double()).to(out)


@pytest.mark.parametrize("kind", ["products", "convolutions", "turns", "states", "compiled", "accelerated"])
def test_checks_of_layers_pass_where_products_are_right(kind: str, stand_in: Any, capsys: Any) -> None:
    gpu_check.run(kind, CPU)
    passed = {"products": 288, "convolutions": 96, "turns": 8, "states": 8, "compiled": 6, "accelerated": 3}
    assert f"{kind}: {passed[kind]} checks passed\n" in capsys.readouterr().out


def test_a_plan_that_keeps_the_first_bias_is_found(stand_in: Any, capsys: Any) -> None:
    biases: dict[Any, Any] = {}

    def remembers(x: Tensor, packed: Tensor, _: None, bias: Any, *rest: Any) -> Tensor:
        key = (x.shape, packed.shape, bias is None)
        return plain_product(x, packed, None, biases.setdefault(key, bias), *rest)

    stand_in["product"] = remembers
    with pytest.raises(gpu_check.Failed) as failed:
        gpu_check.run("turns", CPU)
    assert [each.split(":")[0] for each in str(failed.value).splitlines()] == [
        f"turns, cusparselt bfloat16, {rows} rows" for rows in (16, 64)
    ]
    assert "turns: 6 checks passed, 2 FAILED\n" in capsys.readouterr().out


def test_gradients_that_are_wrong_are_found(stand_in: Any) -> None:
    def too_large(x: Tensor, packed: Tensor, _: None, bias: Any, *rest: Any) -> Tensor:
        unpacks = int(x.count_nonzero()) <= len(x)  # by the identity
        return plain_product(x, packed, None, bias, *rest) * (1 if unpacks or bias is not None else 1.1)

    stand_in["product"] = too_large
    with pytest.raises(gpu_check.Failed, match=r"accelerate, 64 rows: gradient of input: relative error 0\.21"):
        gpu_check.run("accelerated", CPU)


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        ("masks", "foreach_prune", lambda weights, *_: [*weights]),
        ("lists", "foreach_prune", lambda weights, *_: [*weights]),
        ("transposable", "foreach_transposable_mask", lambda scores, *_: [score > 0 for score in scores]),
        ("bits", "foreach_packed_sad", lambda a, b: [0] * len(a)),
    ],
)
def test_a_wrong_kernel_of_masks_is_found(kind: str, name: str, wrong: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_check, name, wrong)
    with pytest.raises(gpu_check.Failed) as failed:
        gpu_check.run(kind, CPU)
    count = {"masks": 90, "lists": 36, "transposable": 48, "bits": 1}[kind]
    assert len(str(failed.value).splitlines()) == count


def test_all_failed_checks_are_reported_and_the_others_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_check, "foreach_prune", lambda weights, *_: [*weights])
    monkeypatch.setattr(gpu_check, "CHECKS", {kind: gpu_check.CHECKS[kind] for kind in ("masks", "bits")})
    assert gpu.main(["check", "lists", "--rehearse", "--out", str(tmp_path / "gpu")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(each.startswith("FAILED: check: masks: prune ") for each in lines) == 90
    assert "masks: 180 checks passed, 90 FAILED" in lines
    assert "bits: 2 checks passed" in lines
    assert len(written(tmp_path / "gpu.csv")) == 4


@pytest.mark.parametrize(
    ("message", "stored", "here"),
    [
        ("CUDA error: operation Not Supported when calling cusparseLtMatmulDescriptorInit", torch.int8, False),
        ("CUSPARSE_STATUS_ARCH_MISMATCH: architecture mismatch", torch.float8_e4m3fn, False),
        ('"cslt" not implemented for Float8', torch.float8_e4m3fn, False),
        ("CUDA error: operation not supported", torch.bfloat16, True),
        ("cuSPARSELt packs 3 of 9 weights (3, 3) wrongly", torch.int8, True),
        ("CUDA out of memory", torch.int8, True),
        ("CUDA error: an illegal memory access was encountered", torch.float8_e4m3fn, True),
    ],
)
def test_only_what_a_library_does_not_support_is_let_pass(message: str, stored: Any, here: bool, stand_in: Any) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError(message)

    stand_in["pack"] = fails
    layer = gpu_check.sparse_linear(64, 32, "2:4", torch.bfloat16, CPU)
    with pytest.raises(RuntimeError if here else gpu_check.NotHere, match=message[:20]):
        gpu_check.packed(layer, "2:4", KINDS["cusparselt"], stored, torch.randn(32, 64).bfloat16())


# --- copies and labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "1:16"])
def test_copies_exceed_the_cache_by_what_is_packed(text: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "cache_to_exceed", lambda bench: 1_000_000)
    layer = gpu_check.sparse_linear(256, 128, text, torch.bfloat16, CPU)
    x = torch.randn(3, 256).bfloat16()
    packed = gpu_check.packed(layer, text, KINDS["skinny_gather"], torch.bfloat16, x)
    monkeypatch.setattr(Skinny, "pack", lambda *_: pytest.fail("packed once more"))
    made = gpu.copies(packed, TINY)
    held = sum(each.nbytes for each in packed.buffers()) + packed.bias.nbytes
    assert held < layer.weight.nbytes * (0.7 if text == "2:4" else 0.2)
    assert len(made) * held >= 1_000_000 > (len(made) - 1) * held
    assert (
        len({each.packed.values.data_ptr() for each in made})
        == len({each.packed.indices.data_ptr() for each in made})
        == len(made)
    )
    assert all(torch.equal(each(x), packed(x)) for each in made)
    dense = gpu.copies(layer, TINY)
    assert len({each.weight.data_ptr() for each in dense}) == -(-1_000_000 // (layer.weight.nbytes + layer.bias.nbytes))


def test_the_cache_is_that_of_the_gpu(monkeypatch: Any) -> None:
    bench = gpu.Bench(CPU, rounds=1, tiny=False)
    for known, size in ((SimpleNamespace(L2_cache_size=50), 200), (SimpleNamespace(), 2**28)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, known=known: known)
        assert gpu.cache_to_exceed(bench) == size


@pytest.mark.parametrize("wins", [False, True])
def test_a_model_is_named_by_what_deploy_returned(wins: bool, monkeypatch: Any) -> None:
    def deploy(model: nn.Module, x: Tensor, **_: Any) -> Any:
        made = copy.deepcopy(model)
        for each in made.blocks if wins else ():
            each.up = PackedLinear(each.up, ow.Pattern(2, 4), Gemm, torch.bfloat16)
        made.deployment = SimpleNamespace(chosen=dict.fromkeys(range(8), "cusparselt"))
        return made

    monkeypatch.setattr(ow, "deploy", deploy)
    with torch.inference_mode():
        dense, fast = gpu.whole_models(TINY)["ViT-L"]()
    assert (dense.impl, dense.pattern, dense.note) == ("dense", "dense", "")
    expected = ("2:4", "2 layers sparse") if wins else ("dense", "deploy returned the dense model")
    assert (fast.impl, fast.pattern, fast.note) == ("deployed", *expected)


# --- several runs ----------------------------------------------------------------------------------------------------


def test_tables_of_several_runs(tmp_path: Path) -> None:
    about = {"gpu": "H100", "versions": "torch 2", "date": "2026-11-28", "impl": "one"}
    first = [row(section="decode", case=case, shape=f"first {case}", **about) for case in ("a", "b", "b")]
    second = [row(section="decode", case="b", shape="second b", **{**about, "date": "2026-11-29"})]
    second.append(row(section="training", case="gpt2", shape="gpt2", **about))
    files = [tmp_path / "1.csv", tmp_path / "2.csv"]
    for file, rows in zip(files, (first, second), strict=True):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    assert [each["shape"] for each in gpu_tables.combined(files)] == ["first a", "second b", "gpt2"]
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- gpu {name} -->\n{name}\n<!-- end -->\n" for name in gpu_tables.TABLES))
    assert gpu.main(["--tables", *map(str, files), "--page", str(page)]) == 0
    text = page.read_text()
    assert "H100, torch 2, 2026-11-28; H100, torch 2, 2026-11-29.\n" in text
    assert "<!-- gpu masks -->\nmasks\n<!-- end -->" in text
    assert "first b" not in text
    assert "| first a |" in text
    assert "| gpt2 | one |" in text
