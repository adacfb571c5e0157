"""An engine in a process of its own, which runs when it is its turn and else sleeps. One line of JSON each way."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from openwork.engines.case import Case, Prepared, Refused, first_line, floats
from openwork.utils.difference import largest_difference

Turn = Callable[[float], list[float]]
"""Run for about so many seconds; the seconds of each run."""


class Worker:
    """A process in which `target`, "module:function", has prepared a case. `names` are its calls, `difference` how far
    the outputs of each are from the expected ones, `version` and `about` as in `Prepared`.

    Raises Refused where it could not, or not within `seconds`. Use it in `with`, or `close` it."""

    def __init__(self, target: str, case: Case, seconds: float = 600.0):
        if not sys.executable:
            raise Refused("this Python has no interpreter to start another process with")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until close)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"OMP_NUM_THREADS": str(case.threads), "MKL_NUM_THREADS": str(case.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()", target, case.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )
        try:
            said = self._answer(seconds)
        except BaseException:
            self.close()
            raise
        self.version, self.about = str(said["version"]), dict(said["about"])
        self.difference: dict[str, float] = said["difference"]
        self.names = list(self.difference)

    def turn(self, name: str, seconds: float, most: float = 600.0) -> list[float]:
        """The seconds of each run of a call, of about `seconds` in all, at least one; one more before is not told."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, seconds]) + "\n")
        self._process.stdin.flush()
        return list(self._answer(most)["times"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(max(0.0, seconds), end)
        timer.daemon = True
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise Refused("took longer than it was given" if late.is_set() else self._last_words())
        said: dict[str, Any] = json.loads(line)
        if "refused" in said:
            raise Refused(said["refused"])
        return said

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1][:160]}" if lines else "")


def serve() -> None:
    """The process itself: prepare, then run what each line asks for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        prepared, apart = _ready(sys.argv[1], Case.of_json(sys.argv[2]))
    except Exception as error:  # it has to reach the process that asked
        say(refused=str(error) if isinstance(error, Refused) else first_line(error))
        return
    say(difference=apart, version=prepared.version, about=dict(prepared.about))
    with torch.inference_mode():
        for line in sys.stdin:
            name, seconds = json.loads(line)
            say(times=timed(prepared.calls[name], seconds))


def _ready(target: str, case: Case) -> tuple[Prepared, dict[str, float]]:
    """What `target` prepares, and how far each call's outputs are from the expected ones."""
    torch.set_num_threads(case.threads)
    module, _, function = target.partition(":")
    prepared: Prepared = getattr(importlib.import_module(module), function)(case)
    with torch.inference_mode():
        expected = case.expected() if prepared.calls else []
        return prepared, {name: largest_difference(expected, floats(call())) for name, call in prepared.calls.items()}


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """The seconds of each run, of about `seconds` in all, at least one; the first, which finds cold caches and
    sleeping threads, is not counted."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def in_rounds(turns: Mapping[str, Turn], seconds: float, rounds: int) -> dict[str, list[list[float]]]:
    """Round by round the times of each, about `seconds` for each in all: a busy moment meets all of them."""
    found: dict[str, list[list[float]]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            found[name].append(turn(seconds / rounds))
    return found


def medians(times: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Of each the median of all its runs, in seconds.

    >>> medians({"a": [[1.0, 3.0], [2.0]]})
    {'a': 2.0}
    """
    flat = {name: sorted(run for each in rounds for run in each) for name, rounds in times.items()}
    return {name: runs[len(runs) // 2] for name, runs in flat.items()}
