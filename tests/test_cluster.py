"""Folds on Ray: what is asked of a cluster, and a fold whose process is killed.

The last tests need Ray, which `make test-slow` has not: `.venv/bin/pip install 'ray>=2.30'`, then
`.venv/bin/python -m pytest -m slow tests/test_cluster.py`. No cluster runs there: comp starts Ray, and ends it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyCompetition, leavings

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,  # not imported here: Ray reads its settings then, which comp sets
    reason="Ray is not installed: pip install 'ray>=2.30'",
)


def die_once(plan: Any, fold: int, link: Any) -> None:
    """Train a fold; but the first process that trains fold 1 is killed in the middle."""
    from comp.training.one_fold import train_job
    from comp.training.resume import Saver

    due, died = Saver.due, Path("died")

    def dying(self: Any, step: int, evaluated: bool) -> bool:
        if fold == 1 and step == 11 and not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return due(self, step, evaluated)

    Saver.due = dying  # type: ignore[method-assign]
    train_job(plan, fold, link)


def test_what_no_machine_has_is_refused_before_ray_waits_for_ever() -> None:
    from comp.training.cluster import GIB, check_nodes

    nodes = [{"CPU": 4.0, "memory": 8.0 * GIB, "node:10.0.0.1": 1.0}, {"CPU": 2.0, "GPU": 1.0, "A100": 1.0}]
    for wanted in ({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {"A100": 0.5}, {"memory": 7.0 * GIB}):
        check_nodes(wanted, nodes)
    with pytest.raises(ValueError, match="no machine of the Ray cluster") as refused:
        check_nodes({"CPU": 4.0, "GPU": 1.0, "memory": 2.0 * GIB}, nodes)
    assert str(refused.value) == (
        "no machine of the Ray cluster has what a job asks for (cpu 4, gpu 1, memory 2); its machines have: cpu 4, "
        "memory 8; A100 1, cpu 2, gpu 1. Ask for less with --resources, or add a machine"
    )
    with pytest.raises(ValueError, match="its machines have: none"):
        check_nodes({"CPU": 1.0}, [])


@pytest.mark.bad_input
def test_without_ray_the_extra_is_named(refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["train", "--config", "tiny.yaml", "--run", "new", "--on", "ray"]
    refuses(arguments, ["--on ray needs the package ray: pip install 'comp[ray]'"])


def test_resources_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from comp.training import dispatch
    from comp.training.dispatch import How, how_of, threads_each

    monkeypatch.setattr(dispatch, "find_ray", lambda: None)

    how = how_of(None, "ray", "cpu=4, gpu=1,accelerator_type:A100=0.1")
    assert how.where == "ray" and how.resources == {"cpu": 4, "gpu": 1, "accelerator_type:A100": 0.1}
    assert threads_each(how) == 4
    assert how_of(2, "ray").num == 2 and how_of(2, "ray").resources == {"cpu": 1}
    assert how_of(1) == How()


class StandIn:
    """As much of Ray as Cluster asks for: a task is done when it is waited for; `lost` ones never come back."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, lost: tuple[str, ...] = ()) -> None:
        self.lost, self.most, self.options = lost, 0, {}

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 99.0}}
        return [gone, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "TPU": 1.0}}]

    def remote(self, **options: Any) -> Callable[..., Any]:
        self.options = options

        def task(fn: Callable[..., Any]) -> Any:
            return type("Task", (), {"remote": staticmethod(lambda *arguments: (fn, arguments))})

        return task

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(tasks))
        return tasks[:1], tasks[1:]

    def get(self, task: Any) -> Any:
        fn, arguments = task
        if arguments[2] in self.lost:
            raise self.exceptions.RayError("The worker died.\nMore.")
        return fn(*arguments)


def halve(number: int, link: Any) -> float:
    link.say("halving")
    if number % 2:
        from comp.runtime import check_devices

        check_devices(["nowhere"])
    return number / 2


def test_jobs_on_a_cluster_are_counted_and_lose_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], isolated: Path
) -> None:
    from comp.training import cluster
    from comp.training.dispatch import How, Job, JobsFailed, map_jobs

    ray = StandIn()
    monkeypatch.setattr(cluster, "find_ray", lambda: ray)
    how = How("ray", 2, {"cpu": 4, "TPU": 1, "memory": 0})
    jobs = [Job(f"job {n}", (n,), Path(f"{n}.log")) for n in (2, 4, 6)]
    assert map_jobs(halve, jobs, how) == [1.0, 2.0, 3.0]
    assert ray.most == 2 and "job 4: halving\n" in capsys.readouterr().out
    assert (ray.options["num_cpus"], ray.options["num_gpus"], ray.options["resources"]) == (4, 1, {"TPU": 1})
    assert ray.options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "4"
    assert ray.options["max_retries"] == 5 and ray.options["max_calls"] == 1

    ray.lost, said = ("job 4",), []
    with pytest.raises(JobsFailed) as failed:
        map_jobs(halve, [*jobs, Job("job 7", (7,))], how, say=said.append)
    lines = str(failed.value).splitlines()
    assert lines[0] == "job 4 ended after 5 more tries (RayError: The worker died.); read 4.log"
    assert lines[1].startswith("job 7 failed: device 'nowhere' is not there")
    assert lines[2].startswith("2 of 4 failed; the other 2 of 4 are done.")
    assert said[0] == lines[0] + "; the others go on"
    with pytest.raises(ValueError, match="no machine of the Ray cluster has what a job asks for .cpu 9, gpu 1.; its"):
        map_jobs(halve, jobs, How("ray", 2, {"cpu": 9}))


@pytest.mark.slow
@with_ray
@pytest.mark.filterwarnings("default")  # Ray's own
def test_three_folds_on_ray_with_one_killed_are_those_of_serial(
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from comp import config_file
    from comp.training import crossval
    from comp.training.dispatch import how_of

    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    data = tiny_competition().config(tiny_model_folder("bert"), evaluation={"every": "3 steps"})
    data["folds"]["num_folds"], data["model"]["dropout"], data["training"]["epochs"] = 3, 0.1, 3
    data["model"]["attention"] = "eager"  # else it is measured here, and left to the machines there
    Path("tiny.yaml").write_text(yaml.safe_dump(data))
    config = config_file.load("tiny.yaml")
    crossval.run(config, "serial", say=lambda line: None)
    monkeypatch.setattr(crossval, "train_job", die_once)
    with pytest.raises(ValueError, match="no machine of the Ray cluster has what a job asks for .cpu 1, gpu 64.; its"):
        crossval.run(config, "refused", how=how_of(None, "ray", "gpu=64"), say=lambda line: None)
    crossval.run(config, "ray", save_every="4 steps", how=how_of(None, "ray"), say=lambda line: None)
    assert Path("died").exists()
    assert leavings("ray", range(3)) == leavings("serial", range(3))
    assert Path("runs/ray/scores.json").read_text() == Path("runs/serial/scores.json").read_text()
    told = capfd.readouterr()
    assert "fold 1: goes on after step 8" in told.out
    for fold in range(3):  # Ray by itself leaves out lines that are alike in two folds
        steps = {line.split()[0] for line in (told.out + told.err).split(f"fold {fold}:  step")[1:]}
        assert {"3", "6", "9", "12", "15"} <= steps, told


@pytest.mark.slow
@with_ray
def test_a_stop_reaches_the_folds_of_a_ray_that_comp_started(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    from comp import config_file
    from comp.training import crossval

    data = tiny_competition().config(tiny_model_folder("bert"), evaluation={"every": None})
    data["model"] |= {"dropout": 0.1, "attention": "eager"}
    data["training"]["epochs"] = 30
    Path("tiny.yaml").write_text(yaml.safe_dump(data))
    crossval.run(config_file.load("tiny.yaml"), "serial", say=lambda line: None)

    command = [sys.executable, "-m", "comp", "train", "--config", "tiny.yaml", "--fold", "all", "--run", "ray"]
    command += ["--on", "ray", "--save-every", "2 steps"]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "RAY_raylet_start_wait_time_s": "300"}
    with open("log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 300
        while not list(Path().glob("runs/ray/fold*/state.pt")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM, Path("log").read_text()
    assert "and saved" in Path("log").read_text()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "goes on after step" in done.stdout, done.stdout + done.stderr
    assert leavings("ray", range(2)) == leavings("serial", range(2))
