"""One process writes into a run folder; a dead one stands in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comp import config_file, lock
from comp.blend.classical import run_classical
from comp.lock import hold, lock_of
from comp.training import crossval
from comp.training.seeds import run_seeds

HOLDER = """
import sys, time
from pathlib import Path
from comp.lock import hold
with hold(Path("runs/tiny")):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(isolated: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds runs/tiny."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_a_killed_one_forgotten(holder: subprocess.Popen[str]) -> None:
    path = lock_of(Path("runs/tiny"))
    with pytest.raises(ValueError, match=f"runs/tiny: process {holder.pid} on {socket.gethostname()} has been writing"):
        hold(Path("runs/tiny")).__enter__()
    assert json.loads(path.read_text())["pid"] == holder.pid, "the refused one leaves the lock as it is"
    with hold(Path("runs/other")):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists(), "a kill leaves the text"
    with hold(Path("runs/tiny")):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_it_is_let_go_after_a_fault_and_leaves_nothing(isolated: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(Path("runs/tiny")):
        raise KeyboardInterrupt
    assert list(isolated.iterdir()) == []
    with hold(Path("runs/tiny")):
        Path("runs/tiny").mkdir()
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]


def text_of(**changes: object) -> None:
    Path("runs").mkdir(exist_ok=True)
    lock_of(Path("runs/tiny")).write_text(json.dumps({**lock._ourselves(), **changes}))


def test_the_lock_of_another_machine_is_heeded_and_can_be_removed(isolated: Path) -> None:
    text_of(host="elsewhere", pid=7)
    with pytest.raises(ValueError, match=r"process 7 on elsewhere .*; if it is gone, .* remove runs/.tiny.lock"):
        hold(Path("runs/tiny")).__enter__()
    lock_of(Path("runs/tiny")).unlink()
    with hold(Path("runs/tiny")):
        pass


@pytest.mark.parametrize("half", ["", "{", "[]", '{"host": "'])
def test_half_a_text_is_no_lock(half: str, isolated: Path) -> None:
    text_of()
    lock_of(Path("runs/tiny")).write_text(half)
    with hold(Path("runs/tiny")):
        pass


def test_without_flock_the_text_decides(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    text_of()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        hold(Path("runs/tiny")).__enter__()
    text_of(started=lock._started(os.getpid()) - 5)  # the number is another process's now
    with hold(Path("runs/tiny")):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    text_of(pid=gone.pid, started=None)
    with hold(Path("runs/tiny")), pytest.raises(ValueError, match="has been writing into it since"):
        hold(Path("runs/tiny")).__enter__()


def test_every_training_takes_it(here: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    config = config_file.load("tiny.yaml")
    with hold(Path("runs/tiny")), pytest.raises(ValueError, match="runs/tiny: process"):
        crossval.run(config, "tiny")
    with hold(Path("runs/tiny")), pytest.raises(ValueError, match="runs/tiny: process"):
        run_classical(config, "tiny", features=["tfidf"], estimator="ridge")
    with hold(Path("runs/tiny-seed3")), pytest.raises(ValueError, match="runs/tiny-seed3: process"):
        run_seeds(config, "tiny", "0", [3])
    with hold(Path("runs/tiny")):
        status, _, err = call("train", "--config", "tiny.yaml")
    assert status == 2 and err.count("\n") == 1
    assert call("train", "--config", "tiny.yaml")[0] == 0
    assert not lock_of(Path("runs/tiny")).exists()
