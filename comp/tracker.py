"""What a training reports to: the interface of every tracker, its null twin, and metrics.jsonl.

No tracker stops a training: a fault while logging is warned of once and passed over, but for a full disk.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from comp.runs import disk_is_full, now

__all__ = ["JsonlTracker", "NullTracker", "Tracker", "Trackers", "Watched", "warn", "without_secrets"]

SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD")


class Tracker(Protocol):
    """What a training loop, and the scoring of its folds, report to."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record `values` at optimizer step `step`; steps never fall."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the values that stand for the whole run."""

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table; every row has as many cells as there are heads, and a column cells of one type (or None)."""

    def picture(self, name: str, png: bytes, about: str) -> None:
        """Record a PNG file's content, with one line on what it shows."""

    def page(self, name: str, html: str) -> None:
        """Record a self-contained page; a tracker that cannot show pages leaves it out."""

    def mark(self) -> dict[str, Any]:
        """Return what `open_tracker` needs to go on from here."""

    def finish(self) -> None:
        """Write out everything and let go; nothing may be logged afterwards."""


class NullTracker:
    """Tracks nothing."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def picture(self, name: str, png: bytes, about: str) -> None:
        pass

    def page(self, name: str, html: str) -> None:
        pass

    def mark(self) -> dict[str, Any]:
        return {}

    def finish(self) -> None:
        pass


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: 0-d arrays and tensors as numbers, NaN and infinities as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class JsonlTracker(NullTracker):
    """Appends one JSON object a line: `{"time", "step", **values}`, at the end `{"time", "summary": {...}}`.

    Each line is flushed, so that a killed run keeps what it logged; half a line that a kill left is cut off
    when the file is opened again. A resumed run goes on in the same file, after its first `keep` bytes (None = all).
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = path.read_bytes()[:keep].rfind(b"\n") + 1
            if whole < path.stat().st_size:
                os.truncate(path, whole)
        self.path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for as long as the run

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_plain(line), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._write({"time": now(), "step": step, **values})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._write({"time": now(), "summary": dict(values)})

    def mark(self) -> dict[str, Any]:
        return {"metrics_bytes": self.path.stat().st_size}

    def finish(self) -> None:
        self._file.close()


class Trackers:
    """Hands everything to several trackers; a fault in one is warned of once and stops none of them."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)
        self._warned: set[int] = set()

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                call(tracker)
            except Exception as fault:
                if disk_is_full(fault, Path.cwd()):
                    raise  # lines would be missing: training stops, and goes on where there is room
                if id(tracker) not in self._warned:
                    self._warned.add(id(tracker))
                    warn(
                        f"{type(tracker).__name__}.{what} failed ({type(fault).__name__}: {fault}); "
                        "training goes on, and its further faults are not reported"
                    )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._each("log", lambda tracker: tracker.log(values, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each("summary", lambda tracker: tracker.summary(values))

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._each("table", lambda tracker: tracker.table(name, heads, rows))

    def picture(self, name: str, png: bytes, about: str) -> None:
        self._each("picture", lambda tracker: tracker.picture(name, png, about))

    def page(self, name: str, html: str) -> None:
        self._each("page", lambda tracker: tracker.page(name, html))

    def mark(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._each("mark", lambda tracker: found.update(tracker.mark()))
        return found

    def finish(self) -> None:
        self._each("finish", lambda tracker: tracker.finish())


class Watched:
    """Passes everything on to a tracker, and every score of the held-out rows to `watch` as well.

    `watch(share, score)`: the share of the steps that are done, in (0, 1], and the score of that evaluation. What it
    raises is not caught, unlike a tracker's faults: so it can end the training.
    """

    def __init__(self, tracker: Tracker, watch: Callable[[float, float], None], num_steps: int) -> None:
        self._tracker, self._watch, self._num_steps = tracker, watch, num_steps

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._tracker.log(values, step)
        if "valid/score" in values:
            self._watch(step / self._num_steps, float(values["valid/score"]))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._tracker.summary(values)

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._tracker.table(name, heads, rows)

    def picture(self, name: str, png: bytes, about: str) -> None:
        self._tracker.picture(name, png, about)

    def page(self, name: str, html: str) -> None:
        self._tracker.page(name, html)

    def mark(self) -> dict[str, Any]:
        return self._tracker.mark()

    def finish(self) -> None:
        self._tracker.finish()


def warn(message: str) -> None:
    """Warn of a fault of somebody else's, without this process's secrets."""
    warnings.warn(without_secrets(message), RuntimeWarning, stacklevel=3)


def without_secrets(text: str) -> str:
    """Return a text with the values of this process's keys, tokens and passwords as ***: other people's errors go here.

    A secret is an environment variable of 8 letters or more whose name says so.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in SECRET):
            text = text.replace(value, "***")
    return text
