"""Trackers beside W&B, asked for by name: `tracking.also: [tensorboard]`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from comp.catalog import Row, pick
from comp.tracker import NullTracker, Tracker

__all__ = ["TRACKERS", "TensorBoardTracker", "TrackioTracker", "open_also"]


MOST_ROWS = 500  # of a table that TensorBoard shows as text


@dataclass(frozen=True)
class Run:
    """What every tracker is told of the run it follows."""

    folder: Path
    """Of the fold, or of the whole run."""
    project: str
    group: str
    name: str
    config: Mapping[str, Any]
    mark: Mapping[str, Any]
    """Of an earlier sitting; {} = none."""


class TensorBoardTracker(NullTracker):
    """Event files in <folder>/tensorboard: scalars, pictures, tables and the config as text.

    After a restart, what was logged beyond the mark is struck out.
    """

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        last = run.mark.get("tensorboard_step")
        self._step = last or 0
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=None if last is None else last + 1)
        if last is None:
            config = json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()), 0)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._step = step
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, float(value), step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.table("summary", ["name", "value"], list(values.items()))

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = ["|".join(map(_cell, heads)), "|".join("---" for _ in heads)]
        lines += ["|".join(map(_cell, row)) for row in rows[:MOST_ROWS]]
        text = "\n".join(f"|{line}|" for line in lines)
        more = f"\n\nthe first {MOST_ROWS} of {len(rows)} rows" if len(rows) > MOST_ROWS else ""
        self._writer.add_text(name, text + more, self._step)

    def picture(self, name: str, png: bytes, about: str) -> None:
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._writer.add_image(name, pixels, self._step, dataformats="HWC")
        self._writer.add_text(f"{name}/about", about, self._step)

    def mark(self) -> dict[str, Any]:
        self._writer.flush()
        return {"tensorboard_step": self._step}

    def finish(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


class TrackioTracker(NullTracker):
    """A run of trackio's local store ($TRACKIO_DIR, else in the home): `trackio show --project <project>`.

    The summary goes as a table, since trackio has none. What was logged beyond the mark before a restart stands twice.
    """

    def __init__(self, run: Run) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):  # it greets
            self._run = trackio.init(
                project=run.project,
                name=run.name,
                group=run.group,
                config=dict(run.config),
                resume="allow" if run.mark.get("trackio") else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._step = 0

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._step = step
        self._run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.table("summary", ["name", "value"], [[name, str(value)] for name, value in values.items()])

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import trackio

        found = trackio.Table(columns=list(heads), data=[list(row) for row in rows])
        self._run.log({name: found}, step=self._step)

    def picture(self, name: str, png: bytes, about: str) -> None:
        import numpy as np
        import trackio
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._run.log({name: trackio.Image(pixels, caption=about)}, step=self._step)

    def mark(self) -> dict[str, Any]:
        return {"trackio": True}

    def finish(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


@dataclass(frozen=True)
class Also(Row):
    """A row of TRACKERS: `make(run) -> Tracker`."""

    package: str = ""
    """What must be installed."""


TRACKERS: dict[str, Also] = {
    "tensorboard": Also(
        TensorBoardTracker, "event files beside metrics.jsonl, for `tensorboard --logdir runs`", "torch", "tensorboard"
    ),
    "trackio": Also(TrackioTracker, "a local dashboard, `trackio show`", "Hugging Face trackio", "trackio"),
}


def check_also(names: Sequence[str]) -> None:
    """Raise ValueError that names the extra when the package of a tracker is not there."""
    for name in names:
        package = pick(TRACKERS, name, "tracker").package
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"tracking.also has {name}, but {package} is not installed: `pip install {package}` (or the extra "
                f"comp[{name}]), or take it out of tracking.also"
            )


def open_also(name: str, run: Run) -> Tracker:
    """Start the tracker called `name`."""
    tracker: Tracker = pick(TRACKERS, name, "tracker").make(run)
    return tracker
