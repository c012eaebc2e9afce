"""Where the numbers of a run go: metrics.jsonl always, Weights & Biases when it is wanted and there.

No tracker stops a training: a fault while logging is warned of once and passed over, but for a full disk.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

from comp.config import Tracking
from comp.runs import disk_is_full, now

__all__ = [
    "JsonlTracker",
    "NullTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "Watched",
    "open_tracker",
    "wandb_mode",
    "without_secrets",
]

Mode: TypeAlias = Literal["online", "offline", "off"]

INIT_TIMEOUT = 20  # seconds; with a key and no network W&B's own default waits 101 s
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD")
LOGIN_HINT = "set WANDB_API_KEY or run `wandb login`"


class Tracker(Protocol):
    """What a training loop reports to."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record `values` at optimizer step `step`; steps never fall."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the values that stand for the whole run."""

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


class JsonlTracker:
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


class WandbTracker:
    """One W&B run, already started: `run` is what `wandb.init` returned.

    `restore` is called after the run has ended, to take back what was set for it.
    """

    def __init__(self, run: Any, restore: Callable[[], None]) -> None:
        self.run = run
        self._restore = restore

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def mark(self) -> dict[str, Any]:
        return {"wandb_id": str(self.run.id)}

    def finish(self) -> None:
        try:
            self.run.finish()
        finally:
            self._restore()


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
                    _warn(
                        f"{type(tracker).__name__}.{what} failed ({type(fault).__name__}: {fault}); "
                        "training goes on, and its further faults are not reported"
                    )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._each("log", lambda tracker: tracker.log(values, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each("summary", lambda tracker: tracker.summary(values))

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

    def mark(self) -> dict[str, Any]:
        return self._tracker.mark()

    def finish(self) -> None:
        self._tracker.finish()


def _warn(message: str) -> None:
    warnings.warn(without_secrets(message), RuntimeWarning, stacklevel=3)


def without_secrets(text: str) -> str:
    """Return a text with the values of this process's keys, tokens and passwords as ***: other people's errors go here.

    A secret is an environment variable of 8 letters or more whose name says so.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in SECRET):
            text = text.replace(value, "***")
    return text


# --- Weights & Biases ---------------------------------------------------------------------------------------


def _installed() -> bool:
    # a folder ./wandb of earlier runs looks like a package to Python, but one without an origin
    spec = find_spec("wandb")
    return spec is not None and spec.origin is not None


def _has_key() -> bool:
    """Return whether W&B would find an API key: WANDB_API_KEY, or its host in ~/.netrc (or $NETRC)."""
    if os.environ.get("WANDB_API_KEY", "").strip():
        return True
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entry = netrc.netrc(file.expanduser()).authenticators(urlsplit(url).netloc)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False


def wandb_mode(setting: str) -> tuple[Mode, str]:
    """Return how W&B will run under `tracking.wandb: setting`, and why, in words for `comp doctor`.

    auto: off without the package or with WANDB_MODE=disabled, offline with WANDB_MODE=offline or without a
    key, else online. Raises ValueError when online or offline is asked for and cannot be.
    """
    if setting == "off":
        return "off", "tracking.wandb is off"
    if not _installed():
        if setting == "auto":
            return "off", "wandb is not installed"
        raise ValueError(
            f"tracking.wandb is {setting}, but wandb is not installed: `pip install wandb` (or the extra "
            "comp[track]), or set tracking.wandb to auto or off"
        )
    if setting == "offline":
        return "offline", "tracking.wandb is offline"
    if setting == "online":
        if _has_key():
            return "online", "tracking.wandb is online"
        raise ValueError(
            f"tracking.wandb is online, but there is no API key: {LOGIN_HINT}, or set tracking.wandb to auto or offline"
        )
    asked = os.environ.get("WANDB_MODE", "")
    if asked == "disabled":
        return "off", "WANDB_MODE is disabled"
    if asked in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE is {asked}"
    if not _has_key():
        return "offline", f"no API key; {LOGIN_HINT}"
    return "online", "an API key was found"


def _set_environment(changes: Mapping[str, str]) -> Callable[[], None]:
    """Set environment variables and return the function that puts the old ones back."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return restore


def _start_wandb(mode: Literal["online", "offline"], folder: Path, **about: Any) -> Tracker:
    """Start a W&B run whose files stay under `folder`/wandb; offline when online fails, else without."""
    place = folder.resolve() / "wandb"
    place.mkdir(parents=True, exist_ok=True)
    # W&B itself appends "wandb" to WANDB_DIR; data and cache would go to the home
    restore = _set_environment(
        {
            "WANDB_DIR": str(place.parent),
            "WANDB_DATA_DIR": str(place / "data"),
            "WANDB_CACHE_DIR": str(place / "cache"),
        }
    )
    try:
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT)
        if wandb.run is not None:
            wandb.run.finish()  # else init would hand back that run, and two folds would share one

        def start(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(mode=mode, dir=str(place.parent), settings=settings, **about)

        try:
            run = start(mode)
        except (wandb.errors.CommError, wandb.errors.UsageError) as fault:
            if mode == "offline":
                raise
            _warn(
                f"W&B cannot be reached ({type(fault).__name__}: {fault}); tracking offline into {place}, "
                "send it later with `wandb sync`"
            )
            run = start("offline")
    except Exception as fault:
        restore()
        _warn(f"W&B could not be started ({type(fault).__name__}: {fault}); training goes on without it")
        return NullTracker()
    except BaseException:
        restore()
        raise
    return WandbTracker(run, restore)


def open_tracker(
    tracking: Tracking,
    *,
    competition: str,
    run_name: str,
    fold: int | str,
    folder: Path,
    metrics_path: Path,
    config_dict: Mapping[str, Any],
    job_type: str = "train",
    mark: Mapping[str, Any] | None = None,
) -> Tracker:
    """Return the tracker of one fold: `metrics_path` as JSON lines, and one W&B run unless that is off.

    The W&B run is `<run_name>-fold<k>` (or `<run_name>-full`), its group `tracking.group` or `run_name`,
    its project `tracking.project` or `competition`; `config_dict` is its config. W&B's files go to
    `folder`/wandb. `mark`: of the tracker of an earlier sitting, to go on with. Raises ValueError when
    `tracking.wandb` asks for what is not there.
    """
    mode, _ = wandb_mode(tracking.wandb)
    mark = mark or {}
    trackers: list[Tracker] = [JsonlTracker(metrics_path, mark.get("metrics_bytes"))]
    if mode != "off":
        started = _start_wandb(
            mode,
            folder,
            project=tracking.project or competition,
            group=tracking.group or run_name,
            name=f"{run_name}-{fold}" if fold == "full" else f"{run_name}-fold{fold}",
            job_type=job_type,
            tags=list(tracking.tags),
            config=dict(config_dict),
            **({"id": mark["wandb_id"], "resume": "allow"} if "wandb_id" in mark else {}),
        )
        trackers.append(started)
    return Trackers(trackers)
