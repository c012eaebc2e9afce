"""One progress line: rate, time left for this part and for the whole job, and what the loop adds.

In a terminal, and in a notebook that somebody looks at, it is drawn anew in its place, by tqdm. Elsewhere (a log file,
a notebook that Kaggle runs by itself) a line is printed every half minute, and nothing for what takes less. Plain tqdm
in notebooks, too: its own notebook bar is a widget, and warns where ipywidgets is not installed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["DELAY", "NullProgress", "OpenProgress", "Progress", "ProgressLines", "open_progress"]

EVERY = 30.0  # seconds between the lines of a log
NOTEBOOK_WIDTH = 110
DELAY = 2.0
"""Seconds after which work that is mostly short, or inside another, is worth a bar."""


class NullProgress:
    """The progress of a loop nobody watches."""

    def advance(self, count: int = 1, **shown: str) -> None:
        """Count `count` more and show `name=value` pairs."""

    def say(self, line: str) -> None:
        """Print a line above the bar."""

    def close(self) -> None:
        """Finish the line."""


OpenProgress = Callable[..., NullProgress]
"""As `open_progress`: (total, label, done=..., to_come=...) -> the progress of one loop."""


class Progress(NullProgress):
    """A line drawn anew in its place. `to_come`: units of the job's parts after this one."""

    def __init__(self, bar: tqdm[Any], to_come: float = 0) -> None:
        self._bar, self._to_come = bar, to_come
        self._shown = ""

    def advance(self, count: int = 1, **shown: str) -> None:
        if shown:
            self._shown = " ".join(f"{name} {value}" for name, value in shown.items())
        if self._to_come:
            done = self._bar.n + count - self._bar.initial
            seconds = time.time() - self._bar.start_t
            left = ((self._bar.total or 0) - self._bar.n - count + self._to_come) * seconds / max(done, 1)
            self._bar.set_postfix_str(f"{self._shown} all {_clock(left)}".strip(), refresh=False)
        elif shown:
            self._bar.set_postfix_str(self._shown, refresh=False)
        self._bar.update(count)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class ProgressLines(NullProgress):
    """A line of a log every half minute; nothing before the first is due.

    `named`: what is said begins with the label, where several jobs write into one log.
    """

    def __init__(
        self, total: int, label: str, unit: str = "step", done: int = 0, to_come: float = 0, *, named: bool = False
    ) -> None:
        self.total, self.label, self.unit, self.to_come, self.named = total, label, unit, to_come, named
        self.first = self.done = done
        self.started = self.last = time.monotonic()
        self._shown = ""

    def advance(self, count: int = 1, **shown: str) -> None:
        self.done += count
        if shown:
            self._shown = ", ".join(f"{name} {value}" for name, value in shown.items())
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Return where it stands after `seconds` of work."""
        rate = (self.done - self.first) / max(seconds, 1e-9)
        parts = [f"{self.label}: {self.done:,} of {self.total:,} {self.unit}s ({self.done / max(self.total, 1):.0%})"]
        if rate > 0:
            parts.append(f"{rate:,.2f}/s" if rate < 10 else f"{rate:,.0f}/s")
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
            if self.to_come:
                parts.append(f"{_clock((self.total - self.done + self.to_come) / rate)} for the whole job")
        return ", ".join([*parts, self._shown] if self._shown else parts)

    def say(self, line: str) -> None:
        print(f"{self.label}:{line}" if self.named else line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Return seconds as 12:34 or 1:02:34."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _in_notebook() -> bool:
    """Tell whether stderr goes to a notebook that somebody looks at."""
    inside = type(sys.stderr).__module__.partition(".")[0] == "ipykernel"
    return inside and os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch"


def open_progress(
    total: int, label: str, unit: str = "step", done: int = 0, *, to_come: float = 0, delay: float = 0
) -> NullProgress:
    """Open a bar over `total` units, `done` of them before now.

    `to_come`: units of the parts of the job that come after this one; with any, the time left for the whole job is
    shown, too. `delay`: seconds of work before a terminal shows anything; then the bar goes when it is done, as one
    inside another should. Without tqdm it is lines, as in a log.
    """
    terminal, notebook = sys.stderr.isatty(), _in_notebook()
    if not (terminal or notebook):
        return ProgressLines(total, label, unit, done, to_come)
    try:
        from tqdm import tqdm
    except ImportError:
        return ProgressLines(total, label, unit, done, to_come)
    interval = 0.2 if terminal else 1.0
    bar = tqdm(
        initial=done, total=total, desc=label, unit=unit, mininterval=interval, maxinterval=10 * interval,
        dynamic_ncols=terminal, ncols=None if terminal else NOTEBOOK_WIDTH, delay=delay, leave=not delay,
    )  # fmt: skip
    return Progress(bar, to_come)
