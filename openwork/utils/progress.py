"""One line on the terminal that says how far a long task is and how long the rest will take."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line on stderr, written again as the task goes on. `shown` None: where stderr is a terminal."""

    def __init__(self, total: int, shown: bool | None = None):
        self.total, self.done = total, 0
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.start = time.monotonic()
        self._width = 0

    def advance(self, what: str) -> None:
        """One more of `total` is done; `what` says which and with what result."""
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        self._write(f"{self.done}/{self.total}  {what}  {duration(left)} left")

    def end(self) -> None:
        if self.shown and self._width:
            sys.stderr.write("\n")

    def _write(self, line: str) -> None:
        if self.shown:
            sys.stderr.write(f"\r{line:<{self._width}}")
            sys.stderr.flush()
            self._width = len(line)


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(42.4), duration(200), duration(7300)
    ('42 s', '3 min 20 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
