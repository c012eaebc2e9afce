"""One progress line, by tqdm: rate, time left, and what the loop adds. Quiet where nobody watches."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["NullProgress", "Progress", "open_progress"]


class NullProgress:
    """The progress of a loop nobody watches."""

    def advance(self, count: int = 1, **shown: str) -> None:
        """Count `count` more and show `name=value` pairs."""

    def say(self, line: str) -> None:
        """Print a line above the bar."""

    def close(self) -> None:
        """Finish the line."""


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


def open_progress(total: int, label: str, unit: str = "step", done: int = 0) -> NullProgress:
    """Open a bar over `total` units, `done` of them before now; without tqdm it is silent.

    In a log file it prints a line every 30 seconds at most.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return NullProgress()
    interval = 0.2 if sys.stderr.isatty() else 30.0
    bar = tqdm(
        initial=done, total=total, desc=label, unit=unit, mininterval=interval, maxinterval=interval, dynamic_ncols=True
    )
    return Progress(bar)
