"""Folds and seeds side by side: the bits of one after the other, and no job is lost with another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyCompetition, leavings

# A worker imports this file, to find the functions that it is sent: nothing heavy stands here.


@pytest.fixture
def config(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Any:
    """Write a config of three folds, 15 steps each, with dropout."""
    from comp import config_file

    data = tiny_competition().config(tiny_model_folder("bert"), evaluation={"every": "3 steps"})
    data["folds"]["num_folds"] = 3
    data["model"]["dropout"] = 0.1
    data["training"]["epochs"] = 3
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    return config_file.load("tiny.yaml")


# --- jobs ------------------------------------------------------------------------------------------------------------


def misfortune(plan: Any, fold: int, link: Any) -> None:
    """Train a fold; but the process of fold 1 is killed in the middle, and fold 2 meets a loss that is not finite."""
    from comp.training.objective import Objective
    from comp.training.one_fold import train_job
    from comp.training.resume import Saver

    due, share, calls = Saver.due, Objective.share, []

    def dying(self: Any, step: int, evaluated: bool) -> bool:
        if step == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return due(self, step, evaluated)

    def diverging(*args: Any) -> Any:
        calls.append(1)
        return share(*args) * (float("nan") if len(calls) == 8 else 1)

    if fold == 1:
        Saver.due = dying  # type: ignore[method-assign]
    if fold == 2:
        Objective.share = diverging  # type: ignore[method-assign]
    train_job(plan, fold, link)


def wait_for_the_end(path: str, seconds: float, link: Any) -> str:
    """Say that it is at work, and work until it is asked to stop, which takes some time."""
    from comp.training.trainer import Stopped

    Path(path).write_text(str(os.getpid()))
    link.say("at work")
    end = time.monotonic() + 120
    while link.stopper.signal is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(seconds)
    Path(path).write_text("saved")
    raise Stopped("stopped after step 5, and saved", link.stopper.signal or 0)


def tenfold(number: int, link: Any) -> tuple[int, str | None, int]:
    import torch

    link.say("a table\nof two lines")
    bar = link.open_progress(10, "not shown", done=2)
    bar.advance(8, loss="1.0")
    bar.say("  half of it")
    bar.close()
    print("by the way")
    if number == 3:
        raise ZeroDivisionError("of a library")
    return number * 10, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()


def eventually(holds: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


# --- tests -----------------------------------------------------------------------------------------------------------


def test_folds_side_by_side_leave_the_bits_of_serial_whatever_befalls_some(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comp.runs import RunFolder, read_json
    from comp.training import crossval
    from comp.training.dispatch import How, JobsFailed
    from comp.training.one_fold import train_job

    said: list[str] = []
    crossval.run(config, "whole", say=lambda line: None)
    monkeypatch.setattr(crossval, "train_job", misfortune)
    with pytest.raises(JobsFailed) as failed:
        crossval.run(config, "cut", save_every="4 steps", how=How("processes", 2), say=said.append)
    lines = str(failed.value).splitlines()
    killed = "fold 1 ended by SIGKILL, which is often the system's answer to too little memory; read runs/cut/logs/fold"
    assert any(line.startswith(killed) for line in lines), lines
    assert any(line.startswith("fold 2 failed: training stopped at step 8: loss nan") for line in lines), lines
    assert lines[-1].startswith("2 of 3 failed; the other 1 of 3 are done. What is saved is whole: the same command")
    assert any(line.startswith("fold 1 ended by SIGKILL") and line.endswith("; the others go on") for line in said)
    assert "out-of-fold scores so far: folds 1, 2 are not trained yet" in said
    assert RunFolder("runs/cut").finished_folds() == [0]
    assert "fold 1: 40 rows to train on" in Path("runs/cut/logs/fold1.log").read_text()
    assert "the loss" not in Path("runs/cut/logs/fold0.log").read_text()
    assert sum("\n" in line for line in said) == 2, "groups and scores, each once"

    monkeypatch.setattr(crossval, "train_job", train_job)
    said.clear()
    crossval.run(config, "cut", how=How("processes", 2), say=said.append)
    assert "fold 1: goes on after step 8" in said and "fold 0: finished before, skipped" in "".join(said)
    assert leavings("cut", range(3)) == leavings("whole", range(3))
    assert Path("runs/cut/scores.json").read_text() == Path("runs/whole/scores.json").read_text()
    assert {name: read_json(Path(f"runs/{name}/manifest.json"))["threads"] for name in ("cut", "whole")} == {
        "cut": 1,
        "whole": 1,
    }


def test_seeds_side_by_side_are_those_of_serial(config: Any, call: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ["train", "--config", "tiny.yaml", "--fold", "0", "--seeds", "3,4"]
    assert call(*arguments, "--run", "serial")[0] == 0
    status, out, err = call(*arguments, "--run", "beside", "--jobs", "2")
    assert status == 0, err
    assert "beside-seed3 fold 0: " in out and "beside-seed4 fold 0: " in out
    for seed in (3, 4):
        assert leavings(f"beside-seed{seed}", [0]) == leavings(f"serial-seed{seed}", [0])
    assert Path("runs/beside.seeds.json").read_text() == Path("runs/serial.seeds.json").read_text()


def test_a_job_has_its_threads_and_its_device_and_speaks_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from comp.training import dispatch, processes
    from comp.training.dispatch import How, Job, JobsFailed, map_jobs, threads_each

    monkeypatch.setattr(processes, "visible_devices", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    monkeypatch.setattr(dispatch, "threads_each", lambda how: 2)
    said: list[str] = []
    jobs = [Job(f"job {n}", (n,), tmp_path / f"{n}.log") for n in (1, 2)]
    found = map_jobs(tenfold, jobs, How("processes", 2), say=said.append)
    assert sorted(found) == sorted([(10, "4", 2), (20, "6", 2)]) or sorted(found) == [(10, "6", 2), (20, "4", 2)]
    assert said == ["a table\nof two lines"], "what every job says alike is said once"
    heard = capsys.readouterr().err
    assert "job 1: by the way" in heard and "job 2:  half of it" in heard
    log = (tmp_path / "1.log").read_text()
    # what is printed and what is told come by two ways, and may overtake each other
    assert all(part in log for part in ("job 1\n", "a table\nof two lines\n", "by the way\n", "half of it")), log
    with pytest.raises(JobsFailed, match="^job 3 failed: ZeroDivisionError: of a library\n1 of 1 failed. What is"):
        map_jobs(tenfold, [Job("job 3", (3,), tmp_path / "3.log")], How("processes", 2), say=said.append)
    assert "Traceback" in (tmp_path / "3.log").read_text()
    monkeypatch.undo()
    import torch

    assert threads_each(How()) == torch.get_num_threads()
    assert threads_each(How("processes", 64)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_job(number: int, tmp_path: Path) -> None:
    from comp.training.dispatch import How, Job, map_jobs
    from comp.training.trainer import Stopped

    said: list[str] = []
    paths = [tmp_path / name for name in "ab"]

    def interrupt() -> None:
        assert eventually(lambda: all(path.exists() for path in paths))
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    jobs = [Job(f"job {path.name}", (str(path), 0.0)) for path in [*paths, tmp_path / "c"]]
    with pytest.raises(Stopped) as stopped:
        map_jobs(wait_for_the_end, jobs, How("processes", 2), say=said.append)
    assert stopped.value.signal == number
    told = set(str(stopped.value).split("; "))
    assert told == {f"job {name} stopped after step 5, and saved" for name in "ab"}, "the third never began"
    assert any(line.startswith("stopping: every job finishes its step and saves") for line in said)


SCRIPT = """
import sys
from pathlib import Path
from comp.lock import hold
from comp.training.dispatch import How, Job, map_jobs
from test_jobs import wait_for_the_end
with hold(Path("runs/tiny")) as lock:
    map_jobs(wait_for_the_end, [Job("job", ("job", 2.0))], How("processes", 2), inherit=[lock])
"""


def test_a_job_whose_parent_is_killed_saves_and_keeps_others_out_until_then(isolated: Path) -> None:
    from comp.lock import hold

    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": path})
    assert eventually(lambda: Path("job").exists() and Path("job").read_text().isdigit())
    parent.kill()
    parent.wait()
    with pytest.raises(ValueError, match="it is gone, but a worker of it is still saving its fold: wait a moment"):
        hold(Path("runs/tiny")).__enter__()
    assert eventually(lambda: Path("job").read_text() == "saved")

    def free() -> bool:
        try:
            with hold(Path("runs/tiny")):
                return True
        except ValueError:
            return False

    assert eventually(free)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--jobs", "0"], ["--jobs 0: at least 1 is needed"]),
        (["--jobs", "two"], ["--jobs"]),
        (["--on", "mars"], ["--on 'mars': allowed is ray"]),
        (["--resources", "gpu=1"], ["--resources", "use it with --on ray"]),
        (["--on", "ray", "--resources", "gpu"], ["--resources 'gpu': allowed are like cpu=4,gpu=1"]),
        (["--on", "ray", "--resources", "gpu=-1"], ["--resources 'gpu=-1'"]),
        (["--on", "ray", "--resources", "cpu=0.5"], ["cpu=0.5: a job computes with whole threads"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_ways_to_do_jobs_are_refused(options: list[str], words: list[str], refuses: Callable[..., str]) -> None:
    refuses(["train", "--config", "tiny.yaml", "--run", "new", *options], words)
