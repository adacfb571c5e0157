"""compressed-tensors' sparse-24-bitmask: written here from the description of the format, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import openwork as ow
from openwork.files.checkpoint import check, describe

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def encoded(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three tensors of one weight: the two largest of every four are kept, also where they are zero."""
    R, C = weight.shape
    values, kept = [], []
    flat = weight.flatten().tolist()
    for start in range(0, R * C, 4):
        four = flat[start : start + 4]
        best = sorted(sorted(range(4), key=lambda i: -abs(four[i]))[:2])
        kept += [i in best for i in range(4)]
        values += [start + i for i in best]
    rows = []
    for row in range(R):
        bits = kept[row * C : (row + 1) * C] + [False] * (-C % 8)
        rows.append([sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)])
    return {
        "compressed": weight.flatten()[values].reshape(R, C // 2),
        "bitmask": torch.tensor(rows, dtype=torch.uint8),
        "shape": torch.tensor([[R], [C]]),
    }


def sparse(R: int, C: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(R, C, generator=torch.Generator().manual_seed(seed))
    keep = ow.topn(torch.rand(R * C, generator=torch.Generator().manual_seed(seed + 1)), ow.Pattern(2, 4)).view(R, C)
    return (weight * keep).to(dtype)


def written(path, weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    parts = {f"{base}.{end}": each for base, weight in weights.items() for end, each in encoded(weight).items()}
    save_file(parts | others, path, metadata={"format": "pt"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("R", "C"), [(3, 8), (4, 12), (2, 20), (6, 6)])
def test_read(path, R, C, dtype):
    weight = sparse(R, C, dtype) if dtype.is_floating_point else (sparse(R, C) * 40).to(dtype)
    written(path, {"layer.fc": weight}, {"layer.fc.bias": torch.ones(R)})
    state = ow.load_state_dict(path)
    assert state.keys() == {"layer.fc.weight", "layer.fc.bias"}
    found = state["layer.fc.weight"]
    assert found.dtype == dtype
    assert torch.equal(found.view(INTEGERS[dtype.itemsize]), (weight + 0).view(INTEGERS[dtype.itemsize]))
    assert {each.name: str(each.pattern) for each in check(path) if each.pattern} == {"layer.fc.weight": "2:4"}
    assert describe(path) == check(path)


def test_into_a_model(path):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    weight = sparse(4, 8)
    written(path, {"0": weight}, {name: each for name, each in model.state_dict().items() if name != "0.weight"})
    loaded = ow.load(path, into=nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)))
    assert torch.equal(loaded[0].weight, weight)
    assert torch.equal(loaded[1].weight, model[1].weight)
    ow.verify(loaded, pattern=ow.Selection({"0": "2:4"}, exclude=["1"]))


def test_the_names_of_older_files(path):
    weight = sparse(4, 8)
    for base in ("fc.weight", "fc", "weight", ""):
        parts = {f"{base}.{end}".lstrip("."): each for end, each in encoded(weight).items()}
        save_file(parts, path)
        if base:
            assert list(ow.load_state_dict(path)) == ["weight" if base == "weight" else "fc.weight"]


def test_a_model_in_several_files(tmp_path):
    weight, parts = sparse(4, 8), encoded(sparse(4, 8))
    save_file({"fc.compressed": parts["compressed"]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {"fc.bitmask": parts["bitmask"], "fc.shape": parts["shape"], "fc.bias": torch.ones(4)}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    state = ow.load_state_dict(tmp_path)
    assert torch.equal(state["fc.weight"], weight)
    assert torch.equal(state["fc.bias"], torch.ones(4))
    with pytest.raises(ValueError, match=r"fc\.compressed, .*load the folder|missing; load the folder"):
        ow.load_state_dict(tmp_path / "model-00002-of-00002.safetensors")
    save_file({"fc.bias": torch.ones(4)}, tmp_path / "model-00003-of-00002.safetensors")
    with pytest.raises(ValueError, match="lies in two files"):
        ow.load_state_dict(tmp_path)


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without model\.openwork\.safetensors"):
        ow.load_state_dict(tmp_path)
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    ow.save(model, tmp_path / "model-1.safetensors", pattern="2:4")
    save_file({"more": torch.ones(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"several files, and ow\.save writes one"):
        ow.load_state_dict(tmp_path)
    ow.save(model, tmp_path / "model.openwork.safetensors", pattern="2:4")
    assert torch.equal(ow.load_state_dict(tmp_path)["weight"], model.weight)


BENT = {
    "a bit too many": ({"bitmask": lambda x: x | 1 << 7}, "two of every four"),
    "a bit too few": ({"bitmask": lambda x: x * 0}, "two of every four"),
    "bits past the row": ({"bitmask": lambda x: torch.cat([x[:, :1], x[:, 1:] | 0x80], 1)}, "two of every four"),
    "another shape": ({"shape": lambda x: x.flip(0)}, r"its shape says \[12, 4\], its values \[4, 12\]"),
    "a huge shape": ({"shape": lambda x: x * 10**9}, "its shape says"),
    "a flat shape": ({"shape": lambda x: x.flatten()}, "needed torch.int64"),
    "signed bits": ({"bitmask": lambda x: x.view(torch.int8)}, "needed torch.uint8"),
    "bits of another width": ({"bitmask": lambda x: x[:, :1].contiguous()}, "needed torch.uint8"),
    "flat values": ({"compressed": lambda x: x.flatten()}, "no values of a 2:4 weight"),
    "no values": ({"compressed": lambda x: x[:, :0].contiguous()}, "no values of a 2:4 weight"),
    "booleans": ({"compressed": lambda x: x > 0}, "no values of a 2:4 weight"),
    "no shape": ({"shape": None}, r"fc\.shape is missing"),
    "unstructured": ({"row_offsets": lambda _: torch.zeros(4)}, "sparse-bitmask, which is not N:M"),
    "named twice": ({"weight": lambda _: torch.zeros(4)}, "given to two tensors"),
}


@pytest.mark.parametrize("name", BENT)
def test_bent_files_are_refused(path, name):
    changes, complaint = BENT[name]
    parts = encoded(sparse(4, 12))
    for end, change in changes.items():
        parts[end] = change and change(parts.get(end))
    save_file({f"fc.{end}": each for end, each in parts.items() if each is not None}, path)
    with pytest.raises(ValueError, match=complaint) as caught:
        ow.load_state_dict(path)
    assert str(caught.value).startswith(str(path))


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_bytes_changed_anywhere(path, data):
    """What is accepted is 2:4 and of the shape that was announced."""
    written(path, {"fc": sparse(4, 12)}, {"fc.bias": torch.ones(4)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 255, content[at] ^ 1, *b'09",:{}[]eE-']))
    path.write_bytes(content)
    try:
        state = ow.load_state_dict(path)
    except ValueError:
        return
    for each in describe(path):
        assert state[each.name].shape == each.shape
        if each.pattern:
            assert int((state[each.name].reshape(-1, 4) != 0).sum(1).max()) <= 2
