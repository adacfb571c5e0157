"""Loading is all or nothing: after an error the model is as it was, whatever happened to the file meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import openwork as ow
from openwork.files import checkpoint, container, model_state, reader

SIZE = 72  # each tensor of weights is longer than what Python reads ahead


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(6)))
    ow.project(model, "2:4")
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ow.save(net(1), tmp_path / "net.safetensors", pattern="2:4")
    return tmp_path / "net.safetensors"


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


def before_filling(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], object]) -> None:
    """Something happens before tensor number `at` is written."""
    real, calls = checkpoint.fill, []

    def fill(*args: object) -> None:
        calls.append(1)
        if len(calls) == at:
            act()
        real(*args)

    monkeypatch.setattr(checkpoint, "fill", fill)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("how", ["other bytes", "shorter", "empty", "gone", "another file"])
def test_a_file_that_changes_after_the_check_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, at: int, how: str
) -> None:
    content = path.read_bytes()

    def change() -> None:
        if how == "other bytes":
            path.write_bytes(content[:-600] + bytes(600))
        elif how == "shorter":
            os.truncate(path, len(content) - 100)
        elif how == "empty":
            os.truncate(path, 0)
        elif how == "gone":
            path.unlink()
        else:
            ow.save(net(2), path, pattern="2:4")

    before_filling(monkeypatch, at, change)
    assert same(ow.load(path, into=net()), net(1).state_dict())


@pytest.mark.parametrize("which", range(1, 13, 4))
def test_a_file_that_changes_while_it_is_read_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Another program writes the weights of another model into it, when the reader is somewhere between."""
    ow.save(net(2), path.with_name("other"), pattern="2:4")
    other, calls, real = path.with_name("other").read_bytes(), [], container.read_tensor

    def read(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == which:
            with open(path, "r+b") as file:
                file.write(other)
        return real(*args)

    monkeypatch.setattr(reader, "read_tensor", read)
    model = net()
    for load in (
        lambda: ow.load(path, into=model),
        lambda: ow.load_state_dict(path),
        lambda: ow.load_deployed(path, model, torch.randn(2, SIZE), chosen={"0.weight": "gemm"}),
    ):
        calls.clear()
        ow.save(net(1), path, pattern="2:4")
        with pytest.raises(ValueError, match=r"tensor '\d.*CRC-32.*written while it was read"):
            load()
        assert same(model, net().state_dict())


def wrong_shape(model: nn.Sequential) -> None:
    model[5] = nn.Linear(SIZE, SIZE - 1)


def wrong_dtype(model: nn.Sequential) -> None:
    model[5].half()


def missing(model: nn.Sequential) -> None:
    del model[5]


def one_more(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def no_values(model: nn.Sequential) -> None:
    model[5].to("meta")


def expanded(model: nn.Sequential) -> None:
    model[5].bias = nn.Parameter(torch.zeros(1).expand(SIZE))


def inference(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[5] = nn.Linear(SIZE, SIZE)


def denser(model: nn.Sequential) -> None:
    ow.sparsify(model, {"5": "1:4"})


@pytest.mark.parametrize("bend", [wrong_shape, wrong_dtype, missing, one_more, no_values, expanded, inference, denser])
def test_a_model_that_does_not_fit_is_untouched(path: Path, bend: Callable[[nn.Sequential], None]) -> None:
    model = net()
    bend(model)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"[56]"):
        ow.load(path, into=model)
    meta = [name for name, each in model.state_dict().items() if each.is_meta]
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items() if name not in meta)


def test_models_made_in_inference_mode_are_filled_there(path: Path) -> None:
    with torch.inference_mode():
        model = net()
        ow.load(path, into=model)
    assert same(model, net(1).state_dict())


@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupt_waits_until_the_model_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    before_filling(monkeypatch, at, lambda: signal.raise_signal(signal.SIGINT))
    model = net()
    with pytest.raises(KeyboardInterrupt):
        ow.load(path, into=model)
    assert same(model, net(1).state_dict())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_the_file_is_read_leaves_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "check_fits", lambda *_: signal.raise_signal(signal.SIGINT))
    model = net()
    with pytest.raises(KeyboardInterrupt):
        ow.load(path, into=model)
    assert same(model, net().state_dict())


def test_other_threads_load_too(path: Path) -> None:
    model = net()
    thread = threading.Thread(target=ow.load, args=(path, model))
    thread.start()
    thread.join()
    assert same(model, net(1).state_dict())


def test_errors_of_memory_come_before_anything_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def read(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:
            raise MemoryError
        return real(*arguments)

    real = container.read_tensor
    monkeypatch.setattr(reader, "read_tensor", read)
    model = net()
    with pytest.raises(MemoryError):
        ow.load(path, into=model)
    assert same(model, net().state_dict())


def test_weights_that_take_room_to_unpack_are_tried_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convolutions() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))

    def read(self: reader.Contents, name: str) -> torch.Tensor:
        if name == "1.weight":
            raise MemoryError
        return real(self, name)

    model, other, real = convolutions(), convolutions(), reader.Contents.read
    before = {name: each.clone() for name, each in model.state_dict().items()}
    ow.project(other, "2:4")
    ow.save(other, path, pattern="2:4")
    monkeypatch.setattr(reader.Contents, "read", read)
    with pytest.raises(MemoryError):
        ow.load(path, into=model)
    assert same(model, before)
    assert model_state.fill is checkpoint.fill
