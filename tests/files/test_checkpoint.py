"""Save and load: no bit changes, nothing is half done, and the bytes are those of docs/format.md."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import openwork as ow
from openwork.files import container, header, reader
from openwork.files import format as fileformat
from openwork.files.checkpoint import check, describe
from openwork.files.reader import opened

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    view = INTEGERS[a.itemsize]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(view), b.contiguous().view(view))
    )


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 5))


def sparse_net(pattern: str = "2:4", **options: object) -> nn.Sequential:
    model = small_net()
    ow.project(model, pattern, **options)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("text", ["2:4", "3:7", "1:16", "32:64", "5:5"])
def test_a_plain_model_comes_back_bit_for_bit(path, text, dtype):
    model = small_net().to(dtype)
    ow.project(model, text, remainder="pad")
    ow.save(model, path, pattern=ow.Selection(text, remainder="pad"))
    assert same_state(ow.load_state_dict(path), model.state_dict())
    twin = small_net().to(dtype)
    assert ow.load(path, into=twin) is twin
    assert same_state(twin.state_dict(), model.state_dict())
    assert {each.name: str(each.pattern) for each in describe(path) if each.pattern} == {
        f"{i}.weight": text for i in (0, 3, 4)
    }


@pytest.mark.parametrize("text", ["2:4", "3:7", "1:16", "32:64"])
def test_weights_of_int8_are_compressed_too(path, text):
    floats = small_net()
    ow.project(floats, text, remainder="pad")
    model = nn.Sequential(*(each for each in floats if isinstance(each, nn.Linear)))
    for each in model:
        each.weight = nn.Parameter((each.weight * 1000).round().clamp(-128, 127).to(torch.int8), requires_grad=False)
    ow.save(model, path, pattern=ow.Selection(text, remainder="pad"))
    assert {each.name: (each.dtype, str(each.pattern)) for each in check(path) if each.pattern} == dict.fromkeys(
        ("0.weight", "1.weight"), (torch.int8, text)
    )
    assert same_state(ow.load_state_dict(path), model.state_dict())
    twin = nn.Sequential(*(each for each in small_net() if isinstance(each, nn.Linear)))
    for each in twin:
        each.weight = nn.Parameter(torch.zeros_like(each.weight, dtype=torch.int8), requires_grad=False)
    assert same_state(ow.load(path, into=twin).state_dict(), model.state_dict())
    if text == "2:4":
        assert len(ow.verify(model, pattern=text).sparse) == 2
        model[0].weight.fill_(1)
        with pytest.raises(ow.NotSparse, match=r"0\.weight"):
            ow.verify(model, pattern=text)
        with pytest.raises(ow.NotSparse, match=r"0\.weight"):
            ow.save(model, path, pattern=text)
        with pytest.raises(ValueError, match=r"no parameter of two dims or more|needed .* or bfloat16"):
            ow.sparsify(model, text)


def test_buffers_of_every_dtype_come_back(path):
    model = sparse_net()
    for dtype in header.CODES:
        model.register_buffer(str(dtype).replace(".", "_"), torch.tensor([0, 1, 1]).to(dtype))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("scalar", torch.tensor(7))
    model.register_buffer("transposed", torch.arange(6).view(2, 3).t())
    model.register_buffer("part", torch.arange(9)[2:5])
    model.register_buffer("fleeting", torch.ones(1), persistent=False)
    ow.save(model, path, pattern="2:4")
    assert same_state(ow.load_state_dict(path), model.state_dict())
    assert "fleeting" not in ow.load_state_dict(path)


@pytest.mark.parametrize("method", [ow.SRSTE(), ow.STE(), ow.ASP()])
def test_a_sparsified_model_is_saved_as_finalized_and_left_alone(path, method):
    model = small_net()
    ow.sparsify(model, {"0": "2:4", "3": "1:8"}, method)
    latent = {name: each.clone() for name, each in model.named_parameters()}
    x = torch.randn(2, 8, 4, 4)
    expected = model.eval()(x)
    ow.save(model, path)
    assert all(torch.equal(each, latent[name]) for name, each in model.named_parameters())
    assert ow.masks(model).keys() == {"0.weight", "3.weight"}

    state = ow.load_state_dict(path)
    assert torch.equal(ow.load(path, into=small_net()).eval()(x), expected)
    twin = small_net()
    ow.sparsify(twin, {"0": "2:4", "3": "1:8"}, method)
    assert torch.equal(ow.load(path, into=twin).eval()(x), expected)
    for name, keep in ow.masks(twin).items():
        assert torch.equal(keep, ow.masks(model)[name])
    assert same_state(ow.finalize(model).state_dict(), state)
    assert {each.name: str(each.pattern) for each in describe(path) if each.pattern} == {
        "0.weight": "2:4",
        "3.weight": "1:8",
    }


def test_a_dense_method_is_saved_dense(path):
    model = small_net()
    ow.sparsify(model, "2:4", ow.Dense())
    ow.save(model, path)
    assert all(each.pattern is None for each in describe(path))
    assert same_state(ow.load_state_dict(path), ow.finalize(model).state_dict())


def test_every_axis_comes_back(path):
    model = nn.ModuleDict(
        {
            "transposed": nn.ConvTranspose2d(16, 6, 3, groups=2),
            "attention": nn.MultiheadAttention(8, 2),
            "rnn": nn.LSTM(8, 4, num_layers=2),
            "experts": nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 8, 5))}),
            "depth": nn.Conv1d(8, 16, 3),
        }
    )
    where = {"experts.w": 1}
    report = ow.project(model, "2:4", axis=where)
    ow.save(model, path, pattern=ow.Selection("2:4", axis=where))
    assert {each.name for each in describe(path) if each.pattern} == set(report.sparse)
    assert same_state(ow.load_state_dict(path), model.state_dict())
    with opened(path) as found:
        assert found.sparse["transposed.weight"].axis == ow.Axis(0, blocks=2)


def test_the_flat_axis_comes_back(path):
    model = nn.Conv2d(3, 8, 3)
    ow.project(model, "2:4", axis="kernel")
    ow.save(model, path, pattern=ow.Selection("2:4", axis="kernel"))
    assert same_state(ow.load_state_dict(path), model.state_dict())


def test_wrapped_models_have_plain_names(path):
    model = sparse_net()
    ow.save(torch.compile(model), path, pattern="2:4")
    assert same_state(ow.load_state_dict(path), model.state_dict())
    twin = torch.compile(small_net())
    assert ow.load(path, into=twin) is twin
    assert same_state(twin._orig_mod.state_dict(), model.state_dict())


def test_without_a_pattern_it_is_inferred_aloud(path):
    model = sparse_net("2:4", exclude=["4"])
    with pytest.warns(UserWarning, match=r"inferred .*2:4 for 2, of 3 weights") as caught:
        ow.save(model, path)
    assert caught[0].filename == __file__
    assert [str(each.pattern) for each in describe(path) if each.pattern] == ["2:4", "2:4"]
    assert same_state(ow.load_state_dict(path), model.state_dict())


def test_a_dense_model_is_stored_dense_aloud(path):
    model = small_net()
    with torch.no_grad():
        model[3].weight[:, ::64] = 0  # 63:64 would take more bytes than dense
    with pytest.warns(UserWarning, match="none is sparse"):
        ow.save(model, path)
    assert all(each.pattern is None for each in describe(path))


def test_ties_are_stored_once(path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    ow.project(model, "2:4")
    ow.save(model, path, pattern="2:4")
    entries = {each.name: each for each in describe(path)}
    assert entries["b.weight"].alias_of == "a.weight"
    assert entries["b.weight"].bytes == 0
    state = ow.load_state_dict(path)
    assert state["a.weight"] is state["b.weight"]
    assert same_state(ow.load(path, into=Tied()).state_dict(), model.state_dict())
    loose = Tied()
    loose.b.weight = nn.Parameter(torch.zeros(8, 8))
    assert same_state(ow.load(path, into=loose).state_dict(), model.state_dict())
    ow.project(loose, "2:4")
    ow.save(loose, path, pattern="2:4")
    with pytest.raises(ValueError, match=r"ties b\.weight to a\.weight"):
        ow.load(path, into=Tied())


def test_a_layer_tied_to_latent_weights_keeps_them(path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ow.sparsify(model, "2:4", exclude=["1"])
    model[1].weight = model[0].parametrizations.weight.original
    ow.save(model, path)
    state = ow.load_state_dict(path)
    assert torch.equal(state["1.weight"], model[1].weight)
    assert torch.equal(state["0.weight"], model[0].weight)


def test_buffers_that_share_part_of_their_memory_come_back(path):
    model, memory = sparse_net(), torch.arange(9)
    model.register_buffer("low", memory[:6])
    model.register_buffer("high", memory[3:])
    ow.save(model, path, pattern="2:4")
    assert same_state(ow.load_state_dict(path), model.state_dict())


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_denser_weight_is_named_and_the_old_file_stays(path):
    path.write_bytes(b"old")
    model = sparse_net()
    with torch.no_grad():
        model[3].weight[0, :4] = 1.0
    with pytest.raises(ow.NotSparse, match=r"1 of 192 groups") as caught:
        ow.save(model, path, pattern="2:4")
    assert list(caught.value.layers) == ["3.weight"]
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_pruning_by_multiplication_leaves_minus_zeros_that_project_repairs(path):
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.copy_(-model.weight.abs() - 1)
        model.weight.mul_(torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 1]))
    ow.verify(model, pattern="2:4")
    with pytest.raises(ow.NotSparse, match=r"-0\.0.*ow\.project"):
        ow.save(model, path, pattern="2:4")
    ow.project(model, "2:4")
    ow.save(model, path, pattern="2:4")


def test_a_broken_promise_is_found(path):
    model = small_net()
    ow.sparsify(model, "2:4")
    with pytest.raises(ValueError, match="pattern= is for plain models"):
        ow.save(model, path, pattern="2:4")
    model[3] = nn.Linear(64, 12)
    with pytest.raises(ow.NotSparse, match=r"3\.weight"):
        ow.save(model, path)
    model[3] = nn.Identity()
    with pytest.raises(ow.NotSparse, match=r"3\.weight: the weight is gone"):
        ow.save(model, path)


def test_a_promise_is_held_through_a_tie(path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ow.sparsify(model, "2:4", exclude=["0"])
    model[1] = nn.Linear(8, 8)
    model[1].weight = model[0].weight
    with pytest.raises(ow.NotSparse, match=r"0\.weight: 16 of 16 groups"):
        ow.save(model, path)


class WithExtra(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state): ...


class Shouting(torch.Tensor):
    pass


def test_state_that_is_not_ordinary_tensors_is_refused(path):
    with pytest.raises(ValueError, match="_extra_state"):
        ow.save(WithExtra(4, 4), path, pattern="2:4")
    model = sparse_net()
    model.register_buffer("loud", torch.ones(2).as_subclass(Shouting))
    with pytest.raises(ValueError, match=r"loud is a Shouting"):
        ow.save(model, path, pattern="2:4")
    model.loud = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match=r"loud is a Tensor \(torch\.sparse_coo\)"):
        ow.save(model, path, pattern="2:4")
    model.loud = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"loud is torch\.complex128"):
        ow.save(model, path, pattern="2:4")
    with pytest.raises(ValueError, match="has no values"):
        ow.save(sparse_net().to("meta"), path, pattern="2:4")
    assert not path.exists()


def test_names_that_the_format_needs_are_refused(path):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    ow.project(model, "2:4")
    model.fc._buffers["weight.values"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"fc\.weight\.values is the name of a tensor"):
        ow.save(model, path, pattern="2:4")


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 11), nn.Linear(11, 5))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (narrow, r"3\.weight is \(12, 64\) in the file, \(11, 64\) in the model"),
        (
            lambda: small_net().half(),
            r"0\.weight: the file is torch\.float32, the model torch\.float16: load into a float32 model and convert",
        ),
        (lambda: small_net()[:4], r"the model lacks 2 tensors, such as '4\.bias', '4\.weight'"),
        (lambda: nn.Sequential(*small_net(), nn.Linear(5, 2)), r"the file lacks 2 tensors, such as '5\.bias'"),
        (lambda: small_net().to("meta"), "has no values"),
    ],
)
def test_another_model_is_left_untouched(path, make, complaint):
    ow.save(sparse_net(), path, pattern="2:4")
    twin = make()
    before = {name: each.clone() for name, each in twin.state_dict().items()}
    with pytest.raises(ValueError, match=complaint):
        ow.load(path, into=twin)
    assert all(each.is_meta or torch.equal(each, before[name]) for name, each in twin.state_dict().items())


def test_a_damaged_file_leaves_the_model_untouched(path):
    ow.save(sparse_net(), path, pattern="2:4")
    content = bytearray(path.read_bytes())
    content[-1] = 0  # an index of the last weight
    path.write_bytes(content)
    describe(path)
    with pytest.raises(ValueError, match=r"net\.safetensors: weight '.*': tensor '.*\.indices': .*CRC-32"):
        check(path)
    twin = small_net()
    before = {name: each.clone() for name, each in twin.state_dict().items()}
    with pytest.raises(ValueError, match="CRC-32"):
        ow.load(path, into=twin)
    assert same_state(twin.state_dict(), before)


def test_masks_that_would_change_the_file_are_refused(path):
    ow.save(sparse_net("2:4"), path, pattern="2:4")
    twin = small_net()
    ow.sparsify(twin, "1:4")
    with pytest.raises(ValueError, match=r"sparsified at 1:4"):
        ow.load(path, into=twin)


def test_an_expanded_buffer_is_refused(path):
    model, twin = sparse_net(), small_net()
    model.register_buffer("scale", torch.ones(4))
    twin.register_buffer("scale", torch.ones(1).expand(4))
    ow.save(model, path, pattern="2:4")
    with pytest.raises(ValueError, match="scale of the model is expanded"):
        ow.load(path, into=twin)


def test_other_files_are_refused(path):
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"not written by ow\.save"):
        ow.load_state_dict(path)
    with pytest.raises(FileNotFoundError):
        ow.load_state_dict(path.with_name("missing"))


def test_big_endian_machines_are_refused(path, monkeypatch):
    path.write_bytes(GOLDEN)
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in (lambda: ow.load_state_dict(path), lambda: ow.save(sparse_net(), path, pattern="2:4")):
        with pytest.raises(ValueError, match="little-endian"):
            call()
    assert path.read_bytes() == GOLDEN


# --- the file ----------------------------------------------------------------------------------------------------


class Golden(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)
        self.out, self.tied = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
        self.tied.weight = self.out.weight
        self.conv = nn.Conv2d(7, 1, 1, bias=False, dtype=torch.bfloat16)
        self.register_buffer("steps", torch.tensor(3))


def crc32_of_the_page(content: bytes) -> str:
    """As docs/format.md has it, bit by bit."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0xEDB88320 * (register & 1)
    return f"{register ^ 0xFFFFFFFF:08x}"


# Written by hand from docs/format.md, which shows it too. Version 1, without checksums: such files stay readable.
GOLDEN_HEADER = (
    r'{"__metadata__":{"openwork":"{\"aliases\":{\"tied.weight\":\"out.weight\"},\"sparse\":{'
    r"\"conv.weight\":{\"axis\":{\"blocks\":1,\"dim\":1},\"dtype\":\"BF16\",\"packing\":\"bitmask\","
    r"\"pattern\":\"3:7\",\"shape\":[1,7,1,1]},"
    r"\"fc.weight\":{\"axis\":{\"blocks\":1,\"dim\":1},\"dtype\":\"F32\",\"packing\":\"indices\","
    r"\"pattern\":\"2:4\",\"shape\":[2,8]}},"
    r'\"version\":1}"},'
    '"steps":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    '"fc.bias":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},'
    '"fc.weight.values":{"dtype":"F32","shape":[2,4],"data_offsets":[16,48]},'
    '"out.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[48,72]},'
    '"conv.weight.values":{"dtype":"BF16","shape":[1,1,1,3],"data_offsets":[72,78]},'
    '"conv.weight.indices":{"dtype":"U8","shape":[1],"data_offsets":[78,79]},'
    '"fc.weight.indices":{"dtype":"U8","shape":[2],"data_offsets":[79,81]}}     '
)
GOLDEN_DATA = (
    "0300000000000000"  # steps: 3
    "0000003f 000000bf"  # fc.bias: 0.5 -0.5
    "0000803f 00000040 00000000 00000000"  # fc.weight, row 0: 1 2, and a group of zeros: two spare slots
    "00004040 00008040 00000000 0000a040"  # row 1: 3 4, 0 (spare) 5
    "00000000 0000803f 00000040 00004040 00008040 0000a040"  # out.weight
    "803f 00c0 4040"  # conv.weight: 1 -2 3
    "4a"  # its bitmask: positions 1, 3, 6
    "4c 89"  # fc.weight: 0 3, 0 1; 1 2, 0 2
)
GOLDEN = len(GOLDEN_HEADER).to_bytes(8, "little") + GOLDEN_HEADER.encode() + bytes.fromhex(GOLDEN_DATA)


def with_checksums(golden: str, data: bytes, ends: tuple[int, ...]) -> bytes:
    """A file of version 1 as one of version 2, whose tensors end at `ends`."""
    starts = (0, *ends)
    sums = "".join(crc32_of_the_page(data[start:end]) for start, end in zip(starts, ends, strict=False))
    text = golden.rstrip().replace(r"\"version\":1", r"\"version\":2")
    text = text.replace('{"__metadata__":{', '{"__metadata__":{"openwork.crc32":"00000000' + sums + '",')
    text += " " * (-len(text) % 8)
    length = len(text).to_bytes(8, "little")
    own = crc32_of_the_page(length + text.encode())
    return length + text.replace('crc32":"00000000', 'crc32":"' + own, 1).encode() + data


GOLDEN_2 = with_checksums(GOLDEN_HEADER, bytes.fromhex(GOLDEN_DATA), (8, 16, 48, 72, 78, 79, 81))


def test_golden_bytes(path):
    model = Golden()
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [0, 3, 4, 0, 0, 0, 5, 0]]))
        model.fc.bias.copy_(torch.tensor([0.5, -0.5]))
        model.out.weight.copy_(torch.arange(6).view(3, 2))
        model.conv.weight.copy_(torch.tensor([0.0, 1, 0, -2, 0, 0, 3]).view(1, 7, 1, 1))
    ow.save(model, path, pattern={"fc": "2:4", "conv": "3:7"})
    assert path.read_bytes() == GOLDEN_2
    for content in (GOLDEN, GOLDEN_2):
        path.write_bytes(content)
        assert same_state(ow.load_state_dict(path), model.state_dict())
        assert same_state(ow.load(path, into=Golden()).state_dict(), model.state_dict())


def test_the_document_shows_the_golden_bytes():
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    shown = "".join(document.split("```hexdump\n")[1].split("```")[0].split())
    assert shown == "".join(f"{each:02x}" for each in GOLDEN[-81:])
    first = len('00000000{"__metadata__":{"openwork.crc32":"')
    digits = GOLDEN_2[first : first + 64].decode()
    assert " ".join(digits[i : i + 8] for i in range(0, 64, 8)) in document
    assert crc32_of_the_page(b"123456789") == "cbf43926"
    assert "cbf43926" in document


def test_equal_models_give_equal_bytes(path):
    model = sparse_net()
    ow.save(model, path, pattern="2:4")
    first = path.read_bytes()
    ow.save(ow.load(path, into=small_net()), path, pattern="2:4")
    assert path.read_bytes() == first


@pytest.mark.parametrize("text", ["2:4", "1:4", "1:16", "3:7", "32:64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_values_and_index_bits_and_little_more(path, text, dtype):
    pattern = ow.Pattern.parse(text)
    model = nn.Linear(16 * pattern.m, 512, bias=False, dtype=dtype)
    ow.project(model, text)
    ow.save(model, path, pattern=text)
    groups = 16 * 512
    index_bits = min(pattern.n * (pattern.m - 1).bit_length(), pattern.m)
    ideal = groups * (pattern.n * 8 * dtype.itemsize + index_bits) / 8
    assert ideal <= path.stat().st_size <= 1.02 * ideal + 500


def test_safetensors_reads_what_we_wrote_and_we_read_the_same(path):
    ow.save(sparse_net(), path, pattern="2:4")
    theirs = load_file(path)
    with open(path, "rb") as file:
        metadata, stored = header.read_header(file)
        ours = {name: container.read_tensor(file, each) for name, each in stored.items()}
    assert same_state(ours, theirs)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == metadata


@pytest.mark.parametrize("metadata", [{}, {"openwork": '{"é\u2028":"\\"}'}])
def test_the_bytes_are_those_of_safetensors_own_writer(path, metadata):
    tensors = {str(dtype)[6:]: torch.tensor([[0, 1, 1]]).to(dtype) for dtype in header.CODES}
    tensors |= {name: torch.ones(2) for name in ("b", "a", "B", "é", "日本", "\U0001f600", 'q"\\\x01\n', "")}
    tensors |= {"none": torch.empty(0, 3), "scalar": torch.tensor(7), "strided": torch.arange(6).view(2, 3).t()}
    layout = {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}
    container.write(path, layout, reversed(tensors.items()), metadata)
    with open(path, "rb") as file:
        metadata = header.read_header(file)[0]
    theirs = path.with_name("theirs")
    save_file({name: each.contiguous() for name, each in tensors.items()}, theirs, metadata=metadata)
    if len(metadata) == 1:
        assert path.read_bytes() == theirs.read_bytes()
    # The order of several metadata is random there.
    ours, other = (split(each.read_bytes()) for each in (path, theirs))
    assert ours == other
    assert list(ours[0]) == list(other[0])


def split(content: bytes) -> tuple[dict[str, object], bytes]:
    """The header as an object, and the data, of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_describing_reads_no_tensor(path, monkeypatch):
    ow.save(sparse_net(), path, pattern="2:4")

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(reader, "read_tensor", refuse)
    assert len(describe(path)) == 11
    with pytest.raises(AssertionError, match="a tensor was read"):
        check(path)


def test_reads_that_come_in_pieces_are_put_together(path):
    """As Linux does beyond 2 GB: one call of the system gives no more."""

    class Pieces(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:1000])

    tensor = torch.arange(9000, dtype=torch.int64)
    container.write(path, {"a": (tensor.dtype, (9000,))}, [("a", tensor)], {})
    with io.BufferedReader(Pieces(path)) as file:
        _, stored = header.read_header(file)
        assert torch.equal(container.read_tensor(file, stored["a"]), tensor)


def test_files_of_more_than_4_gb(path, monkeypatch):
    """Their large tensor is a hole, which takes no room on the disk."""
    layout = {"large": (torch.int64, (2**29 + 1,)), "small": (torch.int8, (3,))}
    put = container._put
    monkeypatch.setattr(
        container, "_put", lambda file, tensor, stored: stored.shape == (3,) and put(file, tensor, stored)
    )
    small = torch.tensor([1, 2, 3], dtype=torch.int8)
    model_metadata = fileformat.metadata({}, {})
    container.write(path, layout, [("large", torch.empty(0)), ("small", small)], model_metadata)
    assert path.stat().st_size > 2**32
    assert {each.name: each.shape for each in describe(path)} == {"large": (2**29 + 1,), "small": (3,)}
    with opened(path) as found:
        assert torch.equal(found.read("small"), small)
    with safe_open(path, "pt") as theirs:
        assert torch.equal(theirs.get_tensor("small"), small)


def test_entries(path):
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4))
    ow.project(model, {"0": "1:8"}, remainder="pad")
    ow.save(model, path, pattern=ow.Selection({"0": "1:8"}, remainder="pad"))
    found = {each.name: each for each in check(path)}
    assert describe(path) == check(path)
    assert (found["0.weight"].shape, found["0.weight"].dtype) == ((4, 10), torch.float32)
    assert found["0.weight"].pattern == ow.Pattern(1, 8)
    assert found["0.weight"].bytes == 4 * 2 * 4 + 3  # two groups a row, a slot each; 8 indices of 3 bits
    assert found["0.weight"].density == 2 / 10
    assert (found["1.weight"].pattern, found["1.weight"].bytes, found["1.weight"].density) == (None, 64, 1.0)


# --- atomic writing ----------------------------------------------------------------------------------------------

WRITER = """
import os, signal, sys, torch, openwork as ow
from openwork.files import container
from openwork.files import reader
path, stage = sys.argv[1], sys.argv[2]
model = torch.nn.Linear(256, 512)
ow.project(model, "2:4")
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def after(function):
    def call(*args, **options):
        function(*args, **options)
        die()
    return call
if stage == "half": container._put = after(container._put)
if stage == "written": os.fsync = die
if stage == "synced": os.fsync = after(os.fsync)
if stage == "rename": os.replace = die
if stage == "renamed": os.replace = after(os.replace)
version = 1
while True:
    torch.nn.init.constant_(model.bias, version)
    ow.save(model, path, pattern="2:4")
    print(version, flush=True)
    version += 1
"""


def killed_writer(path: Path, stage: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(path), stage]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["half", "written", "synced", "rename", "renamed"])
def test_killed_at_each_stage_it_leaves_the_old_file_or_the_new_one(path, stage):
    model = nn.Linear(256, 512)
    ow.project(model, "2:4")
    nn.init.constant_(model.bias, 0)
    ow.save(model, path, pattern="2:4")
    process = killed_writer(path, stage)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    check(path)
    assert float(ow.load_state_dict(path)["bias"][0]) == (1.0 if stage == "renamed" else 0.0)


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_whole_file(path):
    process = killed_writer(path, "none")
    assert process.stdout.readline() == "1\n", process.stderr.read()
    for _ in range(5):
        time.sleep(random.random() / 4)
        process.kill()
        last = process.communicate(timeout=120)[0].split() or ["1"]
        check(path)
        assert float(ow.load_state_dict(path)["bias"][0]) in (int(last[-1]), int(last[-1]) + 1)
        process = killed_writer(path, "none")
        process.stdout.readline()
    process.kill()
    process.communicate()


def test_an_error_while_writing_leaves_nothing_behind(path, monkeypatch):
    ow.save(sparse_net(), path, pattern="2:4")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "_put", full)
    with pytest.raises(OSError, match="No space"):
        ow.save(sparse_net(), path, pattern="2:4")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# --- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys, torch, openwork as ow
def now(key): return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
path, what = sys.argv[1:]
model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8)))
if what == "save":
    ow.project(model, "2:4")
open("/proc/self/clear_refs", "w").write("5")
before = now("VmRSS")
ow.save(model, path, pattern="2:4") if what == "save" else ow.load(path, into=model)
print(now("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peaks of memory")
def test_saving_holds_one_layer_at_a_time_and_loading_the_file_besides(path):
    layer, file = 16.0, 8 * 8.5  # MiB: one dense weight; the eight of them at 2:4
    for what in ("save", "load"):
        arguments = [sys.executable, "-c", PEAK, str(path), what]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        # Loading reads the whole file before it changes the model.
        assert float(done.stdout) < 2.5 * layer + file * (what == "load") < 8 * layer, what


def test_a_link_stays_a_link(path):
    real = path.with_name("real.safetensors")
    real.write_bytes(b"")
    path.symlink_to(real)
    ow.save(sparse_net(), path, pattern="2:4")
    assert path.is_symlink()
    assert sorted(os.listdir(path.parent)) == [path.name, real.name]
    check(real)


def test_saving_says_nothing_when_asked_with_a_pattern(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ow.save(sparse_net(), path, pattern="2:4")
        ow.load_state_dict(path)
