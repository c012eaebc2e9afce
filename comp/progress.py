"""One progress line, by tqdm: rate, time left, and what the loop adds. Quiet where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Lines", "NullProgress", "OpenProgress", "Progress", "open_progress"]

SECONDS = 30.0  # between two lines in a log file


class NullProgress:
    """The progress of a loop nobody watches."""

    def advance(self, count: int = 1, **shown: str) -> None:
        """Count `count` more and show `name=value` pairs."""

    def say(self, line: str) -> None:
        """Print a line above the bar."""

    def close(self) -> None:
        """Finish the line."""


OpenProgress = Callable[..., NullProgress]
"""(total, label, done=...) -> the progress of one loop."""


class Progress(NullProgress):
    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def advance(self, count: int = 1, **shown: str) -> None:
        if shown:
            self._bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in shown.items()), refresh=False)
        self._bar.update(count)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Lines(NullProgress):
    """A line of its own now and then: bars of several processes in one log file would write over each other."""

    def __init__(self, total: int, label: str, done: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.label, self.done, self.clock = total, label, done, clock
        self.written = clock()

    def advance(self, count: int = 1, **shown: str) -> None:
        self.done += count
        if self.clock() - self.written >= SECONDS:
            self.written = self.clock()
            told = "".join(f"  {name} {value}" for name, value in shown.items())
            sys.stderr.write(f"{self.label}: {self.done:,} of {self.total:,} steps{told}\n")

    def say(self, line: str) -> None:
        sys.stderr.write(f"{self.label}:{line}\n")


def open_progress(total: int, label: str, unit: str = "step", done: int = 0) -> NullProgress:
    """Open a bar over `total` units, `done` of them before now; without tqdm it is silent.

    In a log file it prints a line every 30 seconds at most.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return NullProgress()
    interval = 0.2 if sys.stderr.isatty() else SECONDS
    bar = tqdm(
        initial=done, total=total, desc=label, unit=unit, mininterval=interval, maxinterval=interval, dynamic_ncols=True
    )
    return Progress(bar)
