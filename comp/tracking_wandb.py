"""Weights & Biases: how it will run, one run of it, and runs it wrote offline, made ready to be sent.

Everything stays under the run folder: what W&B stages, too. It names staged files by absolute paths, so that a folder
that has been moved (a run of Kaggle's, looked at here) has `relocate` put the paths right before it is sent.
"""

from __future__ import annotations

import netrc
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from comp.runs import write_atomic
from comp.tracker import NullTracker, Tracker, warn

__all__ = ["WandbTracker", "has_key", "host_of_wandb", "installed", "relocate", "start_wandb", "wandb_mode"]

Mode: TypeAlias = Literal["online", "offline", "off"]

INIT_TIMEOUT = 20  # seconds; with a key and no network W&B's own default waits 101 s
LOGIN_HINT = "set WANDB_API_KEY or run `wandb login`"
STAGED = "/wandb/data/artifacts/staging/"


class WandbTracker:
    """One W&B run, already started: `run` is what `wandb.init` returned.

    Curves run against the optimizer step ("step"). `best`: name of a logged value -> "min" or "max", its summary.
    `restore` is called after the run has ended, to take back what was set for it.
    """

    def __init__(self, run: Any, restore: Callable[[], None], best: Mapping[str, str] | None = None) -> None:
        self.run = run
        self._restore = restore
        run.define_metric("step", hidden=True)
        for pattern in ("train/*", "valid/*"):
            run.define_metric(pattern, step_metric="step")
        for name, better in (best or {}).items():
            run.define_metric(name, step_metric="step", summary=better)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.run.log({**values, "step": step}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def table(self, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(heads), data=[list(row) for row in rows])
        self.run.log({name: table}, commit=False)  # with the next log, or at the end

    def picture(self, name: str, png: bytes, about: str) -> None:
        import wandb

        place = Path(self.run.dir) / f".{name.replace('/', '-')}.png"
        place.write_bytes(png)
        try:
            self.run.log({name: wandb.Image(str(place), caption=about)}, commit=False)  # makes a copy
        finally:
            place.unlink()

    def page(self, name: str, html: str) -> None:
        import wandb

        self.run.log({name: wandb.Html(html, inject=False)}, commit=False)

    def mark(self) -> dict[str, Any]:
        return {"wandb_id": str(self.run.id)}

    def finish(self) -> None:
        try:
            self.run.finish()
        finally:
            self._restore()


def installed() -> bool:
    """Return whether the package is there."""
    # a folder ./wandb of earlier runs looks like a package to Python, but one without an origin
    spec = find_spec("wandb")
    return spec is not None and spec.origin is not None


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def host_of_wandb() -> tuple[str, int]:
    """Return host and port of the W&B server."""
    parts = urlsplit(_base_url())
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


def has_key() -> bool:
    """Return whether W&B would find an API key: WANDB_API_KEY, or its host in ~/.netrc (or $NETRC)."""
    if os.environ.get("WANDB_API_KEY", "").strip():
        return True
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entry = netrc.netrc(file.expanduser()).authenticators(urlsplit(_base_url()).netloc)
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
    if not installed():
        if setting == "auto":
            return "off", "wandb is not installed"
        raise ValueError(
            f"tracking.wandb is {setting}, but wandb is not installed: `pip install wandb` (or the extra "
            "comp[track]), or set tracking.wandb to auto or off"
        )
    if setting == "offline":
        return "offline", "tracking.wandb is offline"
    if setting == "online":
        if has_key():
            return "online", "tracking.wandb is online"
        raise ValueError(
            f"tracking.wandb is online, but there is no API key: {LOGIN_HINT}, or set tracking.wandb to auto or offline"
        )
    asked = os.environ.get("WANDB_MODE", "")
    if asked == "disabled":
        return "off", "WANDB_MODE is disabled"
    if asked in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE is {asked}"
    if not has_key():
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


def start_wandb(mode: Literal["online", "offline"], folder: Path, best: Mapping[str, str], **about: Any) -> Tracker:
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
            warn(
                f"W&B cannot be reached ({type(fault).__name__}: {fault}); tracking offline into {place}, "
                "send it later with `comp track sync`"
            )
            run = start("offline")
        tracker = WandbTracker(run, restore, best)
    except Exception as fault:
        restore()
        warn(f"W&B could not be started ({type(fault).__name__}: {fault}); training goes on without it")
        return NullTracker()
    except BaseException:
        restore()
        raise
    return tracker


# --- runs that were written offline ----------------------------------------------------------------------------------

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7  # bytes of LevelDB's log format, in which W&B writes
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def relocate(file: Path) -> int:
    """Let a .wandb file name its staged files where they now are; return how many names were put right.

    They are looked for in the wandb/ folder that the file's own folder is in. The file is written anew only when one
    of its names leads nowhere. Raises ValueError when the file is none of W&B's.
    """
    from wandb.proto import wandb_internal_pb2

    staging, changed, records = file.parent.parent / "data" / "artifacts" / "staging", 0, []
    for raw in _records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        moved = 0
        for entry in record.artifact.manifest.contents if record.HasField("artifact") else []:
            here = staging / Path(entry.local_path).name
            if STAGED in Path(entry.local_path).as_posix() and not Path(entry.local_path).exists() and here.exists():
                entry.local_path = str(here.resolve())
                moved += 1
        records.append(record.SerializeToString() if moved else raw)
        changed += moved
    if changed:
        head = file.read_bytes()[:FILE_HEADER]
        write_atomic(file, lambda temporary: _write_records(temporary, head, records))
    return changed


def _records(file: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file; one that a kill cut off at the end is left out."""
    data = file.read_bytes()
    if not data.startswith(b":W&B"):
        raise ValueError(f"{file} is no file of W&B's; take it away, or train the fold anew")
    place, parts = FILE_HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # too little for a header: zeros up to the next block
            place += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, place)
        piece = data[place + HEADER : place + HEADER + length]
        if kind == 0 or len(piece) < length:
            return
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != crc:
            raise ValueError(f"{file} is damaged at byte {place}; send what there is with `wandb sync {file}`")
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            yield parts
        place += HEADER + length


def _write_records(file: Path, head: bytes, records: Sequence[bytes]) -> None:
    out = bytearray(head)
    for record in records:
        start, first = 0, True
        while first or start < len(record):
            left = BLOCK - len(out) % BLOCK
            if left < HEADER:
                out += bytes(left)
                left = BLOCK
            piece = record[start : start + left - HEADER]
            start += len(piece)
            last = start == len(record)
            kind = (WHOLE if last else FIRST) if first else (LAST if last else MIDDLE)
            out += struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
            first = False
    file.write_bytes(bytes(out))
