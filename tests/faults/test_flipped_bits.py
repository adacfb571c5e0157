"""Storage that changes bits: whatever is read is what was written, or an error that names what is damaged."""

from __future__ import annotations

import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.cli.main import main
from openwork.export import to_huggingface
from openwork.files.checkpoint import check, describe
from openwork.files.plain import opened_plain


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 7, dtype=torch.bfloat16))
    model.register_buffer("on", torch.tensor([True, False, True]))
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("steps", torch.tensor(7))
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    patterns = {"0": "2:4", "1": "3:7"}
    model = net()
    ow.project(model, patterns, remainder="pad")
    ow.save(model, tmp_path / "net.safetensors", pattern=ow.Selection(patterns, remainder="pad"))
    return tmp_path / "net.safetensors"


def places(content: bytes) -> dict[str, tuple[int, int]]:
    """The first and the last byte of the header, and of each tensor, by what errors call them."""
    end = 8 + int.from_bytes(content[:8], "little")
    found = {"the header": (0, end)}
    for name, start, stop in re.findall(rb'"([^"{}]+)":\{[^{}]*"data_offsets":\[(\d+),(\d+)\]', content[:end]):
        found[f"tensor '{name.decode()}'"] = (end + int(start), end + int(stop))
    return found


def flipped(content: bytes, at: int, bit: int) -> bytes:
    bent = bytearray(content)
    bent[at] ^= 1 << bit
    return bytes(bent)


def some(content: bytes, seed: int) -> list[tuple[str, int, int]]:
    """Bits of each part of a file: its first, its last, and ten anywhere."""
    draw = random.Random(seed)
    return [
        (part, at, draw.randrange(8))
        for part, (start, stop) in places(content).items()
        if stop > start
        for at in (start, stop - 1, *(draw.randrange(start, stop) for _ in range(10)))
    ]


def test_every_flipped_bit_is_refused_with_the_name_of_what_it_damaged(path: Path) -> None:
    content = path.read_bytes()
    model = net()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    bits = some(content, 0)
    assert {part for part, _, _ in bits} == {part for part, (a, b) in places(content).items() if b > a}
    assert len(places(content)) == 10
    for part, at, bit in bits:
        path.write_bytes(flipped(content, at, bit))
        for read in (ow.load_state_dict, check, lambda file: ow.load(file, into=model)):
            with pytest.raises(ValueError, match=re.escape(part)) as caught:
                read(path)
            assert str(path) in str(caught.value)
        if part == "the header":
            with pytest.raises(ValueError, match="the header"):
                describe(path)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_the_command_line_refuses_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = path.read_bytes()
    for part, at, bit in some(content, 1)[::8]:
        path.write_bytes(flipped(content, at, bit))
        commands = [["verify", str(path)], ["export", str(path), "--out", str(path.with_name("dense.safetensors"))]]
        for command in [*commands, *([["inspect", str(path)]] if part == "the header" else [])]:
            assert main(command) == 2
            assert part in capsys.readouterr().err
    assert not path.with_name("dense.safetensors").exists()


def test_deploying_from_a_file_looks_at_every_read(path: Path) -> None:
    model = nn.Linear(64, 32)
    ow.project(model, "2:4")
    ow.save(model, path, pattern="2:4")
    content = path.read_bytes()
    for part, at, bit in some(content, 2)[::5]:
        path.write_bytes(flipped(content, at, bit))
        with pytest.raises(ValueError, match=re.escape(part)):
            ow.load_deployed(path, nn.Linear(64, 32), torch.randn(4, 64), chosen={"weight": "gemm"})


def read_plain(path: Path) -> list[torch.Tensor]:
    with opened_plain(path) as contents:
        return [contents.fetch(name) for name in contents.stored]


def test_a_folder_of_hugging_face_and_a_dense_file_of_ours(tmp_path: Path, path: Path) -> None:
    model = nn.Linear(8, 4)
    ow.project(model, "2:4")
    to_huggingface(model, tmp_path / "folder", pattern="2:4")
    assert main(["export", str(path), "--out", str(tmp_path / "dense.safetensors")]) == 0
    for file in (tmp_path / "folder" / "model.safetensors", tmp_path / "dense.safetensors"):
        content = file.read_bytes()
        for part, at, bit in some(content, 3):
            if part != "the header":
                file.write_bytes(flipped(content, at, bit))
                with pytest.raises(ValueError, match=re.escape(part)):
                    read_plain(file)
        file.write_bytes(content)


def test_two_tensors_that_changed_places_and_whole_runs_of_bytes(path: Path) -> None:
    content = path.read_bytes()
    start, stop = places(content)["tensor '0.weight.values'"]
    middle = (start + stop) // 2
    for bent in (
        content[:start] + content[middle:stop] + content[start:middle] + content[stop:],
        content[:start] + bytes(stop - start) + content[stop:],
        content[:start] + b"\xff" * 8 + content[start + 8 :],
    ):
        path.write_bytes(bent)
        with pytest.raises(ValueError, match=r"tensor '0\.weight\.values': .*CRC-32"):
            ow.load_state_dict(path)


def test_checksums_that_are_missing_too_few_or_of_another_header(path: Path) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text, data = content[8:end], content[end:]

    def file(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + data

    def renewed(text: bytes) -> bytes:
        zeros = re.sub(rb'(crc32":")[0-9a-f]{8}', rb"\g<1>00000000", text, count=1)
        own = zlib.crc32(len(zeros).to_bytes(8, "little") + zeros)
        return file(zeros.replace(b"00000000", f"{own:08x}".encode(), 1))

    assert renewed(text) == content
    without = re.sub(rb'"openwork\.crc32":"[0-9a-f]*",', b"", text)
    later = without.replace(b'"openwork":', re.search(rb'"openwork\.crc32":"[0-9a-f]*",', text)[0] + b'"openwork":')
    note = text.replace(b'"openwork":', b'"note":"mine","openwork":')
    digits = re.search(rb'crc32":"([0-9a-f]*)', text)[1]
    for bent, complaint in (
        (file(without), "version 2 without checksums"),
        (file(b'{"note":{},' + later[1:]), "needed exactly dtype"),
        (file(note), "its CRC-32 is"),
        (renewed(text.replace(digits, digits[:-8])), "needed 8 hexadecimal digits for itself and each of 9 tensors"),
        (renewed(text.replace(digits, digits[:-1] + b"g")), "needed 8 hexadecimal digits"),
        (renewed(text.replace(digits, digits[:8] + digits[8:].upper())), "needed 8 hexadecimal digits"),
    ):
        path.write_bytes(bent)
        with pytest.raises(ValueError, match=f"the header: .*{complaint}"):
            describe(path)
    path.write_bytes(renewed(note))
    check(path)
    for bent, complaint in (
        (digits[:-1] + b"\\u00%02x" % digits[-1], "the header: needed 8 hexadecimal digits"),
        (digits[:8] + digits[8:].replace(b"00000000", b"00000001"), r"tensor 'empty': .*CRC-32"),
    ):
        assert bent != digits
        path.write_bytes(renewed(text.replace(digits, bent)))
        with pytest.raises(ValueError, match=complaint):
            check(path)
