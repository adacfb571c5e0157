"""A run that did not finish says so: signals, several processes on one folder, half-written results."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from openwork.cli.main import main
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.lock import locked
from openwork.recipes.module import pl
from openwork.recipes.recipe import train
from openwork.recipes.rundir import RunDir
from openwork.recipes.weights import read_weights
from openwork.utils.signals import Interrupted, Interruption, interruptions

SMALL = {"limit": 64, "limit_val": 16, "batch_size": 16, "epochs": 2, "threads": 1, "progress": False, "log_every": 1}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Send(pl.Callback):
    """Sends this process a signal at a hook of Lightning, the first or a later time."""

    def __init__(self, hook, signum=signal.SIGTERM, times=1):
        def send(*_):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signum)

        self.left = times
        setattr(self, hook, send)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(Config(**SMALL, out=str(out)))
    return out


@pytest.mark.parametrize(("signum", "status"), SIGNALS.items())
def test_a_signal_in_a_step_keeps_a_checkpoint_of_the_next_and_has_the_shells_status(whole, tmp_path, signum, status):
    out = tmp_path / "run"
    if signal.getsignal(signum) == signal.SIG_IGN:
        pytest.skip(f"{signum.name} is ignored here, as under nohup")
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with pytest.raises(
        Interrupted, match=rf"stopped by {signum.name} at step 3 of 8; .*--resume` goes on from"
    ) as stop:
        train(Config(**SMALL, out=str(out)), [Send("on_train_batch_end", signum, 3)])
    assert stop.value.code == status
    assert "its checkpoint of step 3" in str(stop.value)
    assert not (out / "result.json").exists()
    assert before == {each: signal.getsignal(each) for each in SIGNALS}
    if signum != signal.SIGTERM:
        return
    train(Config(**SMALL, out=str(out), resume=True))
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    a, b = (read_weights(each / "model.safetensors") for each in (out, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("hook", "times", "place"),
    [
        ("on_train_start", 1, "the beginning: there is no checkpoint yet"),
        ("on_validation_start", 1, "the beginning: there is no checkpoint yet"),
        ("on_validation_batch_start", 2, "its checkpoint of step 4"),  # the second epoch's
        ("on_save_checkpoint", 1, "its checkpoint of step 5"),
        ("on_train_batch_end", 8, "its checkpoint of step 4"),  # the last
    ],
)
def test_a_signal_elsewhere_stops_the_run_too(tmp_path, hook, times, place):
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=place):
        train(Config(**SMALL, out=str(out)), [Send(hook, times=times)])
    assert not (out / "result.json").exists()
    RunDir(out).checkpoints.newest()  # whole


def test_the_commands_status_and_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("openwork.recipes.recipe.prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", "classification", "--out", str(tmp_path / "run")]) == 143
    said = capsys.readouterr().err
    assert said == "openwork: stopped by SIGTERM; nothing is written yet: the same command starts it again\n"


def test_a_comparison_stops_its_runs(tmp_path):
    """Two runs at a time; the signal comes when the first has begun. None goes on in the background."""
    code = """
import os, signal, sys, threading, time
from openwork.cli.main import main
def send():
    while not os.path.exists(sys.argv[1] + "/dense-seed0/log.txt"):
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send, daemon=True).start()
sys.exit(main(["compare", "classification", "--out", sys.argv[1], "--seeds", "0", "--methods", "dense", "--jobs", "1"]))
"""
    out = tmp_path / "compare"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert "stopped by SIGTERM; its runs too: the same command goes on with them" in done.stderr
    with locked(out / "dense-seed0"):  # nobody has it
        assert not (out / "results.json").exists()


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptions() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            interruption.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_is_raised_at_once_and_an_error_that_follows_the_first_is_not_its_cause(monkeypatch):
    interruption = Interruption()

    def work():
        with interruption.deferred():
            interruption.receive(signal.SIGTERM, None)
            interruption.receive(signal.SIGTERM, None)  # told twice
            raise RuntimeError("a worker was killed by the same signal")

    with pytest.raises(Interrupted, match="SIGTERM"):
        work()
    monkeypatch.setattr("openwork.utils.signals._AGAIN", 0.0)
    interruption._waits = True
    with pytest.raises(Interrupted, match="SIGINT"):
        interruption.receive(signal.SIGINT, None)


def test_a_folder_in_use_names_its_owner_and_a_killed_owner_frees_it(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from openwork.recipes.lock import locked
with locked(Path({str(tmp_path)!r})):
    if os.fork() == 0:  # as a process that loads data: it lives on
        os.close(1)
        import time; time.sleep(30)
    print(os.getpid(), flush=True)
    signal.pause()
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        pid = owner.stdout.readline().strip()
        with pytest.raises(FileExistsError, match=rf"is in use by process {pid} on .*choose another --out"):
            train(Config(**SMALL, out=str(tmp_path)))
        owner.kill()
        owner.wait()
        with locked(tmp_path), pytest.raises(FileExistsError, match="is in use"), locked(tmp_path):
            pass
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.warns(UserWarning, match="without locks .* make sure that no other process writes to it"),
        locked(tmp_path),
    ):
        pass


def test_a_finished_run_whose_page_or_weights_are_missing(whole, tmp_path):
    config = json.loads((whole / "result.json").read_text())["config"]
    (whole / "report.html").unlink()  # killed while it was made
    train(Config.from_values({**config, "resume": True}))
    assert (whole / "report.html").exists()
    kept = (whole / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has a result.json, but no model.safetensors; remove result.json"):
        train(Config.from_values({**config, "resume": True}))
    kept.rename(whole / "model.safetensors")
