"""A disk without room: said before a run starts, and where it fills up amid one, the run goes on later to the same bits."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import leavings

from comp import config_file, runs
from comp.runs import DiskFullError, FoldFolder, disk_is_full, write_atomic
from comp.tracking import JsonlTracker
from comp.training import checkpoint, crossval, one_fold
from comp.training.preflight import space_of
from comp.training.resume import SaveEvery

Call = Callable[..., tuple[int, str, str]]
LONGER = ["model.dropout=0.1", "training.epochs=2", "evaluation.every=3 steps", "stability.averaging={name: ema}"]


def run(name: str, save_every: str = "2 steps") -> None:
    crossval.run(config_file.load("tiny.yaml", LONGER), name, "0", save_every=save_every, say=lambda line: None)


# --- before ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_every", ["auto", "never"])
def test_a_run_that_does_not_fit_is_refused(
    save_every: str, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=300_000))
    states = "states 0.00 MiB" if save_every == "never" else "states 0.7"
    words = ["the run will take", "weights 0.", states, "has 0.29 MiB left", "--fold 0", "--save-every never"]
    refuses(["train", "--config", "tiny.yaml", "--run", "new", "--save-every", save_every], words)


def test_what_is_computed_is_what_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[int] = []
    real = FoldFolder.drop_state

    def drop(self: FoldFolder) -> None:
        states.append(sum(path.stat().st_size for path in (self.state, self.state_before)))
        real(self)

    monkeypatch.setattr(FoldFolder, "drop_state", drop)
    run("new")
    written = {file.name: file.stat().st_size for file in Path("runs/new/fold0").iterdir()}
    weights = sum(size for name, size in written.items() if name.endswith(".safetensors"))
    found = space_of(config_file.load("tiny.yaml", LONGER), 1, False, weights // 3, 60, SaveEvery("steps", 2))
    assert found["weights"] == pytest.approx(weights, rel=0.01)
    assert states[0] <= 1.2 * found["states"] and found["states"] <= 1.2 * states[0]
    assert sum(size for name, size in written.items() if name.endswith(".parquet")) < found["predictions"] + 20_000
    full = space_of(config_file.load("tiny.yaml", LONGER), 0, True, 100, 60, SaveEvery("never"))
    assert (full["weights"], full["states"]) == (200, 0)


# --- amid ------------------------------------------------------------------------------------------------------------


def failing(real: Callable[..., Any], call: int, fault: Exception) -> Callable[..., Any]:
    """Return `real`, but for the `call`-th call, which raises."""
    calls: list[int] = []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise fault
        return real(*args, **options)

    return wrapped


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
OF_RUST = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
FAULTS: dict[str, tuple[Any, str, int, Exception]] = {
    "the first weights": (checkpoint, "save_file", 1, OF_RUST),
    "better weights": (checkpoint, "save_file", 2, OF_RUST),
    "the second state": (torch, "save", 2, NO_SPACE),
    "a late state": (torch, "save", 4, NO_SPACE),
    "a log line": (JsonlTracker, "_write", 2, NO_SPACE),
    "the last weights": (one_fold, "save_weights", 1, NO_SPACE),
    "any file": (os, "fsync", 9, NO_SPACE),
    "the last file": (one_fold, "write_json", 1, NO_SPACE),
}


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves whose disk never fills."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    shutil.copytree(finished, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("new")
        return leavings("new")


@pytest.mark.parametrize("moment", FAULTS)
def test_a_full_disk_stops_the_run_and_leaves_it_whole(
    moment: str, here: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, number, fault = FAULTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), number, fault))
        with pytest.raises(OSError, match=r"No space left|the disk is full"):
            run("new")
    run("new")
    assert leavings("new") == whole


def test_the_command_says_that_the_disk_is_full(here: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, 2, OF_RUST))
        status, _, err = call("train", "--config", "tiny.yaml", "--run", "new")
    assert status == 1 and "Traceback" not in err
    assert "comp: the disk is full (runs/new/fold0/best.safetensors); what was written before is whole" in err
    assert "the same command goes on" in err
    assert call("train", "--config", "tiny.yaml", "--run", "new")[0] == 0


def test_other_faults_of_writing_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(temporary: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        write_atomic(tmp_path / "state.pt", fail)
    real = shutil.disk_usage
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: real(path)._replace(free=4096))
    with pytest.raises(DiskFullError, match="the disk is full: .*state.pt"):
        write_atomic(tmp_path / "state.pt", fail)
    assert not disk_is_full(PermissionError(errno.EACCES, "no"), tmp_path) and not list(tmp_path.iterdir())


# --- a small disk of its own -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `finished` on a file system of 16 MB, as the current folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if not made or made.returncode:
        pytest.skip("a file system can only be mounted by root")
    try:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all the room there is."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_real_disk_that_fills_up(small_disk: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else takes the room in the middle; with the room back, the run goes on."""
    ballast = small_disk / "ballast"
    real, calls = one_fold.HeldOut.keep_best, []

    def keep_best(self: Any, step: int) -> None:
        calls.append(step)
        if len(calls) == 2:
            fill(ballast)
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(one_fold.HeldOut, "keep_best", keep_best)
        with pytest.raises(DiskFullError, match="the disk is full"):
            run("new")
    assert shutil.disk_usage(small_disk).free < 2**20
    ballast.unlink()
    run("new")
    assert leavings("new") == whole
