"""What a run folder holds: its paths, atomic writes, fingerprints of data, folds, config and code.

runs/NAME/  config.yaml  manifest.json  backbone/ (config + tokenizer, no weights)
            foldK/{best.safetensors, last.safetensors, metrics.jsonl, oof.parquet, evaluations.parquet,
            done.json}; state.pt until then
            oof.parquet  scores.json
`comp pretrain`: config.yaml  manifest.json  backbone/ (weights too)  done.json  stageN/{metrics.jsonl, done.json}
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from comp import config_file
from comp.config import Config, Tracking

__all__ = [
    "DiskFullError",
    "RunFolder",
    "check_name",
    "claim",
    "commit",
    "digest",
    "disk_is_full",
    "full_disk_said",
    "kept",
    "newest_finished",
    "now",
    "read_json",
    "sweep",
    "versions",
    "write_atomic",
    "write_json",
    "write_stream",
    "write_text",
]

RUNS = Path("runs")
NAME = re.compile(r"\w[\w .+=@,-]{0,99}")
VERSIONED = ("comp", "torch", "transformers", "tokenizers", "numpy", "pandas", "scikit-learn", "safetensors")


def digest(parts: Iterable[str | bytes]) -> str:
    """Return 16 hex digits of the SHA-256 over `parts`, each preceded by its length so that borders count."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        sha.update(len(raw).to_bytes(8, "little"))
        sha.update(raw)
    return sha.hexdigest()[:16]


class DiskFullError(OSError):
    """The disk is full; what was there is whole."""


def disk_is_full(fault: BaseException, folder: Path) -> bool:
    """Tell whether a fault came from a full disk: by its number, by its words, or by the disk itself."""
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(words in str(fault) for words in ("No space left", "StorageFull", "os error 28")):
        return True  # of libraries that write by themselves
    return "PytorchStreamWriter" in str(fault) and shutil.disk_usage(folder).free < 2**20


@contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """Turn the libraries' several ways to say that the disk is full into DiskFullError."""
    try:
        yield
    except Exception as fault:
        if isinstance(fault, DiskFullError) or not disk_is_full(fault, path.parent):
            raise
        raise DiskFullError(errno.ENOSPC, "the disk is full", str(path)) from fault


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` in the same folder, flush it to disk, then rename onto `path`.

    A reader sees the old file or the whole new one, never a part; a killed process leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with full_disk_said(path):
            write(temporary)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a kill left of files that were being written into a folder: ours, and those of safetensors."""
    for pattern in (".*.part", ".tmp*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """Read a file that holds a JSON object with the keys `needed`. Raises ValueError that names it when it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ValueError(f"{path} is not valid JSON ({fault}); delete it or make the run anew") from None
    if not isinstance(found, dict) or not found.keys() >= set(needed):
        wanted = f"an object with {', '.join(needed)}" if needed else "an object"
        got = f"one with {', '.join(found)}" if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} must hold {wanted}, got {got or 'nothing'}; delete it or make the run anew")
    return found


def kept(path: Path | None, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return the array that is in `path`, or compute it and write it there; None = compute only.

    A read-only or full disk costs what would be kept, with a warning, not what was computed.
    A damaged file is computed anew, and so is a pickle, which is never read.
    """
    if path is not None and path.exists():
        with suppress(ValueError, EOFError):
            found: NDArray[Any] = np.load(path, allow_pickle=False)
            return found
    values = compute()
    if path is not None:
        try:
            write_stream(path, lambda file: np.save(file, values, allow_pickle=False))
        except OSError as fault:
            warnings.warn(f"nothing is kept in {path.parent}: {fault.strerror or fault}", stacklevel=2)
    return values


def write_stream(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write atomically by an open file: by name, NumPy and SciPy add an ending of their own."""

    def to(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write(file)

    write_atomic(path, to)


def check_name(name: str, option: str, root: str) -> None:
    """Raise ValueError unless `name` can be a folder inside `root` and leads nowhere else."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{option}: a name is a folder inside {root}/: up to 100 letters, figures, spaces and _.-+=@, and begins "
            f"with a letter, a figure or _; got {name[:120]!r}"
        )


def now() -> str:
    """Return the UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a result."""
    found = {"python": sys.version.split()[0]}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(folder: Path | str = ".") -> str | None:
    """Return the git commit a folder is at, "+changes" appended when it has any, or None outside git."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        if head.returncode:
            return None
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", "."]
        dirty = subprocess.run(status, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


class RunFolder:
    """The paths inside one run's folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.manifest = self.path / "manifest.json"
        self.backbone = self.path / "backbone"
        self.oof = self.path / "oof.parquet"
        self.scores = self.path / "scores.json"
        self.classical = self.path / "classical.json"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def fold(self, fold: int | str) -> FoldFolder:
        """Return the folder of fold 0, 1, ... or "full"."""
        return FoldFolder(self.path / f"fold{fold}" if fold != "full" else self.path / "full")

    @property
    def pretraining(self) -> FoldFolder:
        """The paths of `comp pretrain`, whose result is `backbone`: they stand in the run folder itself."""
        return FoldFolder(self.path)

    def stage(self, number: int) -> FoldFolder:
        """Return the folder of stage 1, 2, ... of `comp pretrain`."""
        return FoldFolder(self.path / f"stage{number}")

    def begun_stages(self) -> list[str]:
        """Return the folders of stages of `comp pretrain` that are finished or can go on from a saved state."""
        stages = [FoldFolder(path) for path in sorted(self.path.glob("stage*"))]
        return [stage.path.name for stage in stages if stage.begun or stage.done.exists()]

    def finished_folds(self) -> list[int | str]:
        """Return the folds that have run to their end, numbers first, then "full"."""
        numbers = sorted(
            int(folder.name[4:])
            for folder in self.path.glob("fold*")
            if folder.name[4:].isdigit() and (folder / "done.json").exists()
        )
        return [*numbers, *(["full"] if self.fold("full").done.exists() else [])]

    def begun_folds(self) -> list[str]:
        """Return the folders of folds that can go on from a saved state."""
        return sorted(path.name for path in self.path.glob("f*") if FoldFolder(path).begun)


class FoldFolder:
    """The paths inside one fold's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.averaged = path / "averaged.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.oof = path / "oof.parquet"
        self.evaluations = path / "evaluations.parquet"
        self.groups = path / "groups.txt"
        self.bad_batch = path / "bad_batch.json"
        self.done = path / "done.json"
        self.state = path / "state.pt"
        self.state_before = path / "state.before.pt"

    @property
    def begun(self) -> bool:
        """True when a state of unfinished training is there."""
        return not self.done.exists() and (self.state.exists() or self.state_before.exists())

    def blame(self, ids: Iterable[str], about: Mapping[str, float]) -> str:
        """Write the ids of a step that is not finite, and what is known of it; return words that name them."""
        named = [str(name) for name in ids]
        told = {key: value if math.isfinite(value) else str(value) for key, value in about.items()}
        write_json(self.bad_batch, {**told, "ids": named})
        return f"; its rows are {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}, all in {self.bad_batch}"

    def drop_state(self) -> None:
        """Remove the state, of no use once the fold is finished."""
        for path in (self.state, self.state_before):
            path.unlink(missing_ok=True)


def newest_finished(root: Path = RUNS) -> Path:
    """Return the run under `root` that finished a fold last. Raises ValueError when there is none."""
    done = [file for file in root.glob("*/f*/done.json") if not file.parent.parent.name.endswith("-debug")]
    if not done:
        raise ValueError(f"no finished run under {root}/; train one with `comp train`, or name one with --run")
    return max(done, key=lambda file: file.stat().st_mtime).parent.parent


# --- making a run ----------------------------------------------------------------------------------------------------


def claim(
    folder: RunFolder,
    config: Config,
    marks: Mapping[str, str],
    about: Mapping[str, Any],
    *,
    restart: Sequence[int | str] = (),
) -> None:
    """Make the run folder, or make sure that the one there was made from the same config, data and folds.

    `marks`: fingerprints of the data and, where there are any, of the folds. `about`: what else manifest.json says.
    `restart`: folds to forget; when config, data or folds have changed, a restart forgets the whole run. Raises
    ValueError when finished or begun folds came from something else. `tracking` may change freely.
    """
    aside: dict[str, Any] = {"tracking": Tracking()}
    plain = config.model_copy(update=aside if "pretrain" in marks else {**aside, "pretrain": None})
    marks = {"config": digest([config_file.dump(plain)]), **marks}
    before: dict[str, Any] = read_json(folder.manifest) if folder.manifest.exists() else {}
    known: dict[str, str] = before.get("fingerprints", {})
    changed = [part for part, mark in marks.items() if known.get(part, mark) != mark]
    if known and any((kind in known) != (kind in marks) for kind in ("classical", "pretrain")):
        changed.append("kind of model")
    if changed and restart:
        shutil.rmtree(folder.path)
    elif changed and (folder.finished_folds() or folder.begun_folds() or folder.begun_stages()):
        detail = _difference(folder.config, config) if "config" in changed else ""
        raise ValueError(
            f"{folder.path} was made from another {' and another '.join(changed)}{detail}; name a new run with --run, "
            "or start this one anew with --restart"
        )
    for fold in restart:
        shutil.rmtree(folder.fold(fold).path, ignore_errors=True)
    if before and not changed and known.keys() >= marks.keys():
        return
    fingerprints = {**({} if changed else known), **marks}
    write_text(folder.config, config_file.dump(config))
    made = {"created": now(), "commit": commit(), "versions": versions()}
    write_json(folder.manifest, {**made, **about, "fingerprints": fingerprints})


def _difference(path: Path, config: Config) -> str:
    """Return ": key old -> new, ..." between the saved config and this one."""
    saved = config_file.parse_yaml(path.read_text(encoding="utf-8"))
    found = config_file.differences(saved, config.model_dump(mode="json"))
    shown = ", ".join(f"{key} {old} -> {new}" for key, old, new in found[:5])
    return f": {shown}{', ...' if len(found) > 5 else ''}" if found else ""
