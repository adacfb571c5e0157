"""One flipped bit in a checkpoint of a run is refused, and the checkpoint before it is offered."""

import random
import shutil

import pytest
import torch

from openwork.cli.main import main
from openwork.recipes.checkpoints import Checkpoints


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 3 and 7."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.folder.mkdir()
    for step in (3, 7):
        torch.save({"step": step, "weight": torch.full((64,), float(step))}, checkpoints.draft)
        checkpoints.commit(step)
    return checkpoints


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def test_the_last_is_taken_and_the_one_before_is_kept(two):
    assert two.newest() == (two.last, 7)
    assert (step_of(two.last), step_of(two.previous)) == (7, 3)


def test_every_flipped_bit_is_refused(two):
    whole = two.last.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 60):
        flip(two.last, bit)
        with pytest.raises(ValueError, match=r"last.ckpt is damaged: .*previous.ckpt \(step 3\) is whole: remove last"):
            two.newest()
        two.last.write_bytes(whole)


def test_what_is_advised_works(two):
    flip(two.last, 1000)
    two.last.unlink()
    assert two.newest() == (two.previous, 3)
    flip(two.previous, 1000)
    with pytest.raises(ValueError, match=r"previous.ckpt is damaged: .*remove it to start this run anew"):
        two.newest()
    two.previous.unlink()
    assert two.newest() is None


@pytest.mark.parametrize("size", [0, 1, 500])
def test_a_cut_file_is_refused(two, size):
    two.last.write_bytes(two.last.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged"):
        two.newest()


@pytest.mark.parametrize("sums", [None, "", "no checksums\n"])
def test_without_checksums_those_of_the_records_count(two, sums):
    two.checksums.unlink()
    if sums is not None:
        two.checksums.write_text(sums)
    assert two.newest() == (two.last, None)
    at = two.last.read_bytes().index(torch.full((4,), 7.0).numpy().tobytes())
    flip(two.last, 8 * at)
    with pytest.raises(ValueError, match=r"the checksum of its record .* is wrong"):
        two.newest()
    two.last.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="it cannot be read"):
        two.newest()


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_a_checkpoint_gets_its_name_leaves_one_that_is_known(two, monkeypatch, renames):
    torch.save({"step": 9}, two.draft)
    left = [renames]

    def replace(*paths):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        shutil.move(*paths)

    monkeypatch.setattr("openwork.recipes.checkpoints.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        two.commit(9)
    path, step = two.newest()
    assert step == step_of(path) == 7
    monkeypatch.undo()
    two.commit(9)
    assert two.newest() == (two.last, 9)


def test_the_command_names_the_file_and_the_way_out(tmp_path, capsys):
    words = ["train", "classification", "--limit", "64", "--limit_val", "16", "--epochs", "3", "--batch_size", "32"]
    words += ["--progress", "false", "--threads", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    (tmp_path / "run" / "result.json").unlink()
    flip(tmp_path / "run" / "checkpoints" / "last.ckpt", 4321)
    assert main([*words, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "last.ckpt is damaged: its SHA-256" in error
    assert "previous.ckpt (step 2) is whole: remove last.ckpt, and --resume goes on from there" in error
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    assert main([*words, "--resume"]) == 0
