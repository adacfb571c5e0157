"""Files made to harm: each is refused with an error that says what is wrong, at no cost beyond the file's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attacks.attacks import ALL, INDICES
from attacks.forge import METADATA, TENSORS, file, good, header_and_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import openwork as ow
from openwork.files import container
from openwork.files import format as fileformat
from openwork.files.checkpoint import check, describe
from openwork.files.header import read_header
from openwork.files.packing import pack_weight, packed_shape
from openwork.files.reader import opened


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)
        self.other = self.fc.bias
        self.conv = nn.Conv2d(7, 1, 1, bias=False, dtype=torch.bfloat16)
        self.register_buffer("on", torch.tensor([True, True]))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def test_the_file_that_attacks_bend_is_good(path):
    path.write_bytes(good())
    state = ow.load_state_dict(path)
    assert state["fc.weight"].tolist() == [[1, 0, 0, 2, 0, 0, 0, 0], [0, 3, 4, 0, 0, 0, 5, 0]]
    assert state["conv.weight"].flatten().tolist() == [0, 1, 0, -2, 0, 0, 3]
    assert state["other"] is state["fc.bias"]
    assert torch.equal(ow.load(path, into=Net()).fc.weight, state["fc.weight"])
    check(path)


@pytest.mark.parametrize("name", ALL)
def test_refused(path, name):
    content, complaint = ALL[name]
    path.write_bytes(content)
    model = Net()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    for read in (ow.load_state_dict, check, lambda path: ow.load(path, into=model)):
        with pytest.raises(ValueError, match=complaint) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    if name.removeprefix("indices: ") not in INDICES and "boolean of 2" not in name:
        with pytest.raises(ValueError, match=complaint):
            describe(path)


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\con",
    "a\0b",
    "..",
    "",
    "\x1b[2J",
    "fc.weight/../x",
    "__class__",
    "é\u202e",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_paths(tmp_path, name):
    path = tmp_path / "net.safetensors"
    entry = METADATA["sparse"]["fc.weight"]
    tensors = {name + end: TENSORS["fc.weight" + end] for end in (".values", ".indices")}
    path.write_bytes(file(*header_and_data(tensors, {"version": 1, "sparse": {name: entry}, "aliases": {}})))
    before = sorted(tmp_path.rglob("*"))
    assert list(ow.load_state_dict(path)) == [name]
    model = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="the model lacks 1 tensor") as caught:
        ow.load(path, into=model)
    assert "\x1b" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


LIMITED = """
import pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from attacks.attacks import ALL
from attacks.forge import good
import openwork as ow
folder = pathlib.Path(sys.argv[2])
for i, (content, _) in enumerate(ALL.values()):
    (folder / str(i)).write_bytes(content)
(folder / "good").write_bytes(good())
ow.load_state_dict(folder / "good")
now = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), now + (64 << 20)))
for i in range(len(ALL)):
    try:
        ow.load_state_dict(folder / str(i))
    except ValueError:
        continue
    raise SystemExit(f"{list(ALL)[i]} was read")
try:
    torch.zeros(1 << 28)
except RuntimeError:
    print("limited")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit memory")
def test_no_attack_gets_more_than_64_mib(tmp_path):
    arguments = [sys.executable, "-c", LIMITED, str(Path(__file__).parent.parent), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "limited\n"), done.stderr


def test_a_file_that_shrinks_while_it_is_read(path):
    content = file({"a": {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}}, bytes(1 << 20))
    path.write_bytes(content)
    with path.open("rb") as opened:
        stored = read_header(opened)[1]["a"]
        os.truncate(path, len(content) - 4)
        with pytest.raises(ValueError, match="became shorter"):
            container.read_tensor(opened, stored)


# --- fuzzing: what is accepted is whole, and safetensors accepts it too -------------------------------------------


def hold(path: Path) -> bool:
    """Read a file in every way; whatever is accepted must be consistent. Whether it was."""
    try:
        state = ow.load_state_dict(path)
    except ValueError:
        with pytest.raises(ValueError, match="net"):
            check(path)
        return False
    entries = check(path)
    assert {each.name: (each.shape, each.dtype) for each in entries} == {
        name: (tuple(each.shape), each.dtype) for name, each in state.items()
    }
    with opened(path) as contents, safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == contents.stored.keys()
        for name in contents.stored:
            ours, other = contents.fetch(name), theirs.get_tensor(name)
            assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
            assert bytes(ours.view(-1).view(torch.uint8)) == bytes(other.view(-1).view(torch.uint8))
        for name, each in contents.sparse.items():
            values, indices = pack_weight(state[name], each.pattern, each.axis)
            assert torch.equal(indices, contents.fetch(name + ".indices"))
            assert values.shape == contents.stored[name + ".values"].shape
    return True


fuzzed = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@fuzzed
@given(data=st.data())
def test_bytes_changed_anywhere(path, data):
    content = bytearray(good())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["set", "flip", "cut", "drop", "insert", "repeat"])):
            case "set":
                content[at : at + 1] = bytes([data.draw(st.sampled_from(b'\0\xff{}[]",:0129-eE'))])
            case "flip":
                content[at : at + 1] = bytes(each ^ 1 << data.draw(st.integers(0, 7)) for each in content[at : at + 1])
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + data.draw(st.integers(1, 20))]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
            case "repeat":
                content[at:at] = content[at : at + data.draw(st.integers(1, 40))]
    if data.draw(st.booleans()) and len(content) > 8:  # a length that fits keeps the rest in play
        end = content.rfind(b"]}}") + 3
        content[:8] = max(0, end - 8).to_bytes(8, "little")
    path.write_bytes(content)
    hold(path)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**9, 10**30]),
    st.floats(),
    st.sampled_from(
        ["", "F32", "I8", "U8", "BOOL", "BF16", "indices", "bitmask", "kernel", "1:4", "2:4", "3:7", "1:1", "fc.weight"]
    ),
    st.text(max_size=5),
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(found: object, path: tuple = ()) -> list[tuple]:
    """Every place inside a piece of JSON."""
    if isinstance(found, dict):
        return [path, *(place for key, each in found.items() for place in places(each, (*path, key)))]
    if isinstance(found, list):
        return [path, *(place for i, each in enumerate(found) for place in places(each, (*path, i)))]
    return [path]


def changed(found: object, place: tuple, to: object) -> object:
    if not place:
        return to
    copy = dict(found) if isinstance(found, dict) else list(found)
    copy[place[0]] = changed(found[place[0]], place[1:], to)
    return copy


@fuzzed
@given(data=st.data())
def test_json_changed_anywhere(path, data):
    metadata, header = METADATA, None
    for _ in range(data.draw(st.integers(0, 3))):
        metadata = changed(metadata, data.draw(st.sampled_from(places(metadata))), data.draw(junk))
    header, content = header_and_data(TENSORS, metadata)
    for _ in range(data.draw(st.integers(0, 2))):
        header = changed(header, data.draw(st.sampled_from(places(header))), data.draw(junk))
    path.write_bytes(file(json.dumps(header), content))
    hold(path)


@fuzzed
@example(n=2, m=4, shape=[2, 8], dim=1, blocks=1, seed=0)
@given(
    n=st.integers(1, 8),
    m=st.integers(1, 16),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dim=st.integers(0, 2),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_parts_of_the_right_size_and_any_content(path, n, m, shape, dim, blocks, seed):
    """Claims that fit the tensors, so that the bits themselves are reached."""
    axis = ow.Axis(dim, blocks) if dim < 2 or seed % 2 else ow.Axis(flat=True)
    try:
        pattern = ow.Pattern(n, m)
        values, size = packed_shape(tuple(shape), pattern, axis)
    except ValueError:
        return
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(values).numel()
    content = torch.randint(0, 3, (count,), generator=generator, dtype=torch.uint8)
    bits = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    entry = fileformat._described(fileformat.Sparse(pattern, axis, tuple(shape), torch.int8, ()))
    tensors = {"w.values": ("I8", list(values), bytes(content)), "w.indices": ("U8", [size], bytes(bits))}
    path.write_bytes(file(*header_and_data(tensors, {"version": 1, "sparse": {"w": entry}, "aliases": {}})))
    hold(path)
