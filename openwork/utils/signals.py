"""SIGINT, SIGTERM and SIGHUP as an orderly end, an exception with the shell's exit status; and work that none ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_AGAIN = 1.0  # seconds: an earlier second signal is the same request, told by a terminal and by torchrun


class Interrupted(SystemExit):
    """A signal asked the process to end. `code` is 128 + its number, as a shell has it; `text` says what was stopped.

    A SystemExit: whoever does not catch it ends, with that status and without a traceback.
    """

    def __init__(self, signum: int, text: str = "") -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.text = text or f"stopped by {signal.Signals(signum).name}"

    def __str__(self) -> str:
        return self.text


class Interruption:
    """What `interruptions` yields: the signal that asked this process to end, if one did."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process, self._waits, self._since = os.getpid(), False, 0.0

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def stop(self) -> NoReturn:
        """Raise `Interrupted`: another of several processes was asked, if not this one."""
        raise Interrupted(self.signum or signal.SIGTERM)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal raises nothing: the work asks `signum` where nothing is half done, and calls `check`.

        A signal that nobody asked for is raised at the end, also in place of an error that followed from it. A second
        signal, a second later or more, is raised where it comes.
        """
        self._waits = True
        try:
            yield
        except Exception as error:
            if self.signum is not None:
                raise Interrupted(self.signum) from error
            raise
        finally:
            self._waits = False
        self.check()

    def receive(self, signum: int, _: FrameType | None) -> None:
        """The signal handler."""
        if os.getpid() != self._process:  # a forked process that loads data: its parent ends it
            return
        again = self.signum is not None
        if again and time.monotonic() - self._since < _AGAIN:
            return
        if not again:
            self.signum, self._since = signum, time.monotonic()
        if again or not self._waits:
            raise Interrupted(signum)


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Inside, the signals that ask a process to end raise `Interrupted`; afterwards they do what they did before.

    Signals that are ignored (nohup) stay so; outside of the main thread, which alone receives signals, nothing changes.
    """
    interruption = Interruption()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            signum = getattr(signal, name, None)
            if signum is not None and signal.getsignal(signum) not in (signal.SIG_IGN, None):
                before[signum] = signal.signal(signum, interruption.receive)
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def without_interrupt() -> Iterator[None]:
    """SIGINT waits until the end, and then does what it would have done. (Only the first thread gets any.)"""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
