"""`openwork verify` of checkpoints, whoever wrote them: which weights are N:M, along which axis, with what status."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import openwork as ow
from openwork.cli.main import main
from openwork.export import to_huggingface
from openwork.nm.groups import Axis
from openwork.nm.masks import kept_per_group


def pruned(shape: tuple[int, ...], pattern: str, axis: Axis, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are N:M along one axis and not along the others, made group by group."""
    n, m = ow.Pattern.parse(pattern).n, ow.Pattern.parse(pattern).m
    weight = torch.randn(shape).abs() + 1
    rows = weight.reshape(1, -1) if axis.flat else weight.movedim(axis.dim, -1)
    keep = torch.stack([torch.randperm(m) < n for _ in range(rows.numel() // m)]).reshape(rows.shape)
    keep = keep.reshape(shape) if axis.flat else keep.movedim(-1, axis.dim)
    weight = weight * keep
    assert kept_per_group(weight, ow.Pattern(n, m), axis).max() == n
    return (weight * 20).to(dtype) if dtype == torch.int8 else weight.to(dtype)


WEIGHTS = {
    "linear.weight": pruned((16, 32), "2:4", Axis(1)),
    "conv1d.weight": pruned((32, 16), "2:4", Axis(0)),  # transformers' Conv1D
    "conv.weight": pruned((8, 16, 3, 3), "2:4", Axis(1), torch.bfloat16),
    "flat.weight": pruned((8, 12, 3, 3), "2:4", Axis(flat=True), torch.float16),
    "last.weight": pruned((2, 6, 8), "2:4", Axis(2)),
    "quantized.weight": pruned((16, 32), "2:4", Axis(1), torch.int8),
    "linear.bias": torch.randn(16),
    "position_ids": torch.arange(64).reshape(8, 8),
}
ALONG = {
    "linear.weight": "dim 1",
    "conv1d.weight": "dim 0",
    "conv.weight": "dim 1",
    "flat.weight": "flattened",
    "last.weight": "dim 2, flattened",
    "quantized.weight": "dim 1",
}


def table(printed: str) -> dict[str, list[str]]:
    """The cells of each weight."""
    lines = [line.split(maxsplit=4) for line in printed.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells and cells[0].endswith("weight") and len(cells) == 5}


def along(printed: str) -> dict[str, str]:
    return {name: cells[-1] for name, cells in table(printed).items() if name != "weight"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    save_file(WEIGHTS, "theirs.safetensors")
    return "theirs.safetensors"


def test_a_plain_file_is_held_to_a_pattern_along_any_axis(file, capsys):
    assert main(["verify", file, "--pattern", "2:4"]) == 0
    printed = capsys.readouterr().out
    assert along(printed) == ALONG
    assert table(printed)["quantized.weight"][:3] == ["16x32", "int8", "2:4"]
    assert "6 of 6 weights are 2:4; 2:4 along dim 1: 3; " in printed
    assert printed.endswith("verified: 2:4\n")


def test_a_denser_weight_is_status_one_with_its_name(file, capsys):
    weight = WEIGHTS["linear.weight"].clone()
    weight[3, 4:8] = 1.0
    save_file({**WEIGHTS, "linear.weight": weight}, file)
    assert main(["verify", file, "--pattern", "2:4"]) == 1
    printed = capsys.readouterr().out
    assert along(printed)["linear.weight"] == "along dim 1 1 of 128 groups holds more than 2 of 4 (the worst 4)"
    assert "not 2:4: linear.weight\n" in printed
    assert main(["verify", file, "--pattern", "2:4", "--exclude", "linear"]) == 0
    assert main(["verify", file, "--pattern", "2:4", "--include", "conv*", "flat.weight"]) == 0
    assert set(along(capsys.readouterr().out)) >= {"conv1d.weight", "conv.weight", "flat.weight"}


def test_without_a_pattern_the_tightest_is_shown(file, capsys):
    save_file({"a.weight": pruned((8, 32), "1:16", Axis(1)), "b.weight": torch.ones(4, 8)}, file)
    assert main(["verify", file]) == 0
    printed = capsys.readouterr().out
    assert table(printed)["a.weight"][2:] == ["1:16", "dim 1"]
    assert table(printed)["b.weight"][2:] == ["-", "no N:M pattern with N < M holds"]
    assert "1 of 2 weights has a pattern" in printed


def test_a_weight_that_m_does_not_divide_is_listed_and_not_held(file, capsys):
    save_file({"stem.weight": torch.ones(5, 3, 7, 7), "fc.weight": WEIGHTS["linear.weight"]}, file)
    assert main(["verify", file, "--pattern", "2:4"]) == 0
    printed = capsys.readouterr().out
    assert along(printed)["stem.weight"] == "dim 1 has 3 weights, not a multiple of 4"
    assert "not held to 2:4, which does not divide them: stem.weight" in printed
    save_file({"stem.weight": torch.ones(5, 3, 7, 7)}, file)
    assert main(["verify", file, "--pattern", "2:4"]) == 1  # nothing holds
    assert "no weight can be 2:4" in capsys.readouterr().out


def sharded(folder: Path) -> None:
    names = sorted(WEIGHTS)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    folder.mkdir()
    for file in set(files.values()):
        save_file({name: WEIGHTS[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_a_sharded_folder(file, tmp_path, capsys):
    sharded(tmp_path / "folder")
    save_file({"stray.weight": torch.ones(4, 4)}, tmp_path / "folder" / "other.safetensors")
    assert main(["verify", "folder", "--pattern", "2:4"]) == 0
    assert along(capsys.readouterr().out) == ALONG  # what the index does not list is not the model's
    (tmp_path / "folder" / "model-00002-of-00002.safetensors").unlink()
    assert main(["verify", "folder", "--pattern", "2:4"]) == 2
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../theirs.safetensors"}}', '{"weight_map": {"a": 1}}', "[]", "{", "{}"]
)
def test_an_index_names_files_of_its_folder_alone(file, tmp_path, index, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(index)
    assert main(["verify", "folder"]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors.index.json: " in error
    assert error.count("\n") == 1


def test_a_folder_of_both_kinds_is_checked_in_both(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    ow.project(model, "2:4")
    to_huggingface(model, tmp_path, pattern="2:4")
    assert main(["verify", str(tmp_path), "--pattern", "2:4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the file is intact: every group holds what it records\n")
    assert printed.count("2 of 2 weights are 2:4") == 2
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # fine-tuned and saved again, not by us
    assert main(["verify", str(tmp_path), "--pattern", "2:4"]) == 1
    assert "not 2:4: 0.weight" in capsys.readouterr().out


def test_a_compressed_file_is_held_to_another_pattern(tmp_path, capsys):
    model = nn.Linear(16, 8)
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "net.safetensors", pattern="2:4")
    assert main(["verify", str(tmp_path / "net.safetensors"), "--pattern", "2:4"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "net.safetensors"), "--pattern", "1:4"]) == 1
    printed = capsys.readouterr().out
    assert "not 1:4: weight (recorded as 2:4)" in printed
    assert "tensors sparse" not in printed  # one table


def test_a_weight_that_a_file_records_as_dense_can_be_excluded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"fc": nn.Linear(8, 4), "up": nn.Linear(16, 8)})
    ow.project(model, {"up": "2:4"})
    ow.save(model, "a:b.safetensors", pattern={"up": "2:4"})  # a file, and no factory
    assert main(["verify", "a:b.safetensors", "--pattern", "2:4"]) == 1
    assert capsys.readouterr().out.endswith("not 2:4: fc.weight (recorded as dense; --exclude fc)\n")
    assert main(["verify", "a:b.safetensors", "--pattern", "2:4", "--exclude", "fc"]) == 0


def sparsified() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    ow.sparsify(model, "2:4", ow.SRSTE(), exclude=["1"])
    return model


@pytest.mark.parametrize("verb", ["verify", "plan"])
def test_a_factory_that_sparsifies_records_its_patterns(verb, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(sparsified=sparsified))
    given = [verb, "made:sparsified", "--input", "4x64"]
    assert main(given) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("0.weight")]
    assert "2:4" in line
    for more in (["--pattern", "2:4"], ["--exclude", "0"]):
        assert main([*given, *more]) == 2
        assert "records its patterns: leave --pattern and --exclude out" in capsys.readouterr().err


def beside_a_buffer() -> nn.Module:
    class Beside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.table

    model = Beside(16, 16)
    model.register_buffer("table", torch.randn(16, 16))
    ow.sparsify(model, "2:4")
    return model


def test_a_product_of_a_model_that_is_not_accounted_for_is_an_error_unless_it_is_allowed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(beside_a_buffer=beside_a_buffer))
    given = ["verify", "made:beside_a_buffer", "--input", "4x16"]
    assert main(given) == 2
    assert "1 product is not accounted for:\n  table: (16, 16) multiplied in the model" in capsys.readouterr().err
    assert main([*given, "--allow-dense", "table"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Beside: every weight keeps its pattern; not every product does\n")
    assert "2 products of weights and other constants; 1 sparse; 1 dense\n" in printed
    assert "dense, not accounted for but allowed: table (" in printed


def test_float8_is_listed_as_it_is_stored(tmp_path, capsys):
    save_file({"a.weight": pruned((8, 32), "2:4", Axis(1)).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert main(["verify", str(tmp_path / "a.safetensors")]) == 0
    assert table(capsys.readouterr().out)["a.weight"][1] == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder"], "has no safetensors file, only pytorch_model.bin, which are pickles; needed *.safetensors"),
        (["theirs.safetensors", "--exclude", "head"], "'head' names none of the 6 weights, such as "),
        (["theirs.safetensors", "--pattern", "2;4"], "found '2;4' for a pattern"),
        (["none.safetensors"], "there is no weight to check"),
        (["missing.safetensors"], "No such file"),
    ],
)
def test_mistakes_get_one_line(file, tmp_path, words, message, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pytorch_model.bin").write_bytes(b"")
    save_file({"bias": torch.zeros(3)}, "none.safetensors")
    assert main(["verify", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
