"""Worker processes: shares, faults that are told plainly and never hang, and who may call them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comp import runtime
from comp.runtime import Runtime, check_devices, choose_devices
from comp.ship.workers import Alone, Crew, WorkerFault, open_crew

# A worker imports this file, to open what it is sent: nothing heavy stands here.


@dataclass(frozen=True)
class Doubler:
    """A run whose model is its fold, and whose prediction is the fold times the row."""

    name: str = "doubler"
    does: str = "predict"
    place: int | None = None

    @property
    def key(self) -> str:
        return self.name

    def on(self, place: int) -> Doubler:
        return Doubler(self.name, self.does, place)

    def build(self) -> list[Any]:
        print("built")  # what a library may say on standard output is no answer
        return []

    def fill(self, model: list[Any], fold: Any) -> None:
        model.append(fold)

    def shares(self, content: np.ndarray, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        order = np.argsort(-content)
        return [(places, content[places]) for places in np.array_split(order, number)]

    def predict_with(self, model: list[Any], fold: Any, content: np.ndarray, on_batch: Any) -> np.ndarray:
        if self.does == "mistake" and self.place == 1:
            check_devices(["nowhere"])
        if self.does == "failure":
            raise ValueError("not comp's own")
        if self.does == "kill" and self.place == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.does == "exit":
            os.write(2, b"the last words\n")
            os._exit(3)
        time.sleep(0.01)
        return np.stack([content * float(fold), np.full(len(content), len(model)), _myself(content)], axis=1)


def _myself(content: np.ndarray) -> np.ndarray:
    return np.full(len(content), float(os.getpid()))


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    found = Crew(["cpu", "cpu"])
    yield found
    found.close()


def test_shares_come_back_in_order_and_a_model_is_built_and_filled_once(crew: Crew) -> None:
    rows = np.random.default_rng(0).permutation(100)
    done: list[int] = []
    values = crew.predict(Doubler(), 3, rows, done.append)
    assert np.array_equal(values[:, 0], 3.0 * rows)
    assert (values[:, 1] == 1).all(), "filled once, though it predicted several shares"
    assert sum(done) == 100 and len(done) == 16
    assert set(values[:, 2]) == {float(worker.pid) for worker in crew.workers}, "both took part"
    again = crew.predict(Doubler(), 4, rows, done.append)
    assert np.array_equal(again[:, 0], 4.0 * rows) and (again[:, 1] == 2).all(), "the same model, filled anew"
    other = crew.predict(Doubler("other"), 4, rows, done.append)
    assert (other[:, 1] == 1).all(), "another run, another model"
    assert np.array_equal(Alone().predict(Doubler(), 3, rows, done.append)[:, 0], 3.0 * rows)


def test_faults_are_told_plainly_and_nothing_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    rows = np.arange(40)
    for does, kind, message in (
        ("mistake", ValueError, "device 'nowhere' is not there; this machine has "),
        ("failure", WorkerFault, "(?s)the worker on cpu failed:\n.*ValueError: not comp's own"),
        ("kill", WorkerFault, "the worker on cpu ended by SIGKILL, which is often the system's answer to too little"),
        ("exit", WorkerFault, "(?s)the worker on cpu ended with exit status 3; .*it said:\nbuilt\nthe last words"),
    ):
        hurt = Crew(["cpu", "cpu"] if does in ("mistake", "kill") else ["cpu"])
        with pytest.raises(kind, match=message):
            hurt.predict(Doubler(does=does), 1, rows, lambda done: None)
        for worker in hurt.workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker.pid, 0)
        hurt.close()  # a second time does no harm
    assert "the last words" in capfd.readouterr().err, "what a worker says is passed on"


def test_devices_are_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_devices() is None and choose_devices(names="cuda:1, cpu") == ["cuda:1", "cpu"]
    monkeypatch.setattr(runtime, "visible_devices", lambda: ["cuda:0", "cuda:1"])
    assert choose_devices(3) == ["cuda:0", "cuda:1", "cuda:0"]
    check_devices(["cuda:1", "cpu"])
    for devices in (["cuda:2"], []):
        with pytest.raises(ValueError, match="device '.*' is not there; this machine has cuda:0, cuda:1, cpu"):
            check_devices(devices)


def test_every_visible_gpu_works_unless_there_is_little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from comp.ship import loaded
    from comp.ship.loaded import LoadedRun, crew_of

    opened: list[list[str]] = []
    monkeypatch.setattr(loaded, "open_crew", opened.append)
    two = (Runtime(torch.device("cuda:0"), "fp16"), Runtime(torch.device("cuda:1"), "fp16"))
    for few, num_texts in ((loaded.FEW, 10_000), (loaded.FEW, 100), (0, 100)):
        crew_of(LoadedRun(None, None, {}, [0], "best", two, few=few), num_texts)
    assert opened == [["cuda:0", "cuda:1"], ["cuda:0"], ["cuda:0", "cuda:1"]]
    assert isinstance(open_crew(["cpu"]), Alone)


SCRIPT = """
import sys, numpy as np
from test_workers import Doubler
from comp.ship.workers import Crew
print("started")
crew = Crew(["cpu", "cpu"])
print(crew.predict(Doubler(), 2, np.arange(5), lambda done: None)[:, 0].tolist())
print(*(worker.pid for worker in crew.workers), flush=True)
{end}
"""


@pytest.mark.parametrize("how", ["script", "notebook"])
def test_the_caller_may_be_a_script_without_a_guard_or_have_no_file(how: str, tmp_path: Path) -> None:
    """multiprocessing would run such a script again in every worker. A notebook's __main__ has no file, as here."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end="crew.close()" if how == "script" else "import os; os.kill(os.getpid(), 9)"))
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, str(script)] if how == "script" else [sys.executable, "-"],
        input=None if how == "script" else script.read_text(),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == (0 if how == "script" else -9), done.stderr
    started, values, pids = done.stdout.splitlines()
    assert (started, values) == ("started", "[0.0, 2.0, 4.0, 6.0, 8.0]")
    # the second one was killed: no worker outlives its parent
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.split()))


def eventually(holds: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held
